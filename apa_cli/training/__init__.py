"""Training: the loop, the update, and what puts a run together."""
