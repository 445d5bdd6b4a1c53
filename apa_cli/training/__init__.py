"""Training: the loop, the update, and the construction of a run."""
