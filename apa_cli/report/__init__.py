"""Curves of one run and comparisons of many, from the directories of runs alone."""
