"""Composition of overrides into a checked configuration."""
