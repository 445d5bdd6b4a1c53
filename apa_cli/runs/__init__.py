"""A run's directory: its files, checkpoints, records, trackers and console."""
