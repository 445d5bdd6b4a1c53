"""Benchmarks of a run's phases on synthetic models and prompts."""
