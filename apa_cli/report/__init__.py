"""Curves of one run and comparisons of many, made from their directories alone."""
