"""Processes of a run: world and collectives, GPU selection, start and end."""
