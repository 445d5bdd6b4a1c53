"""Several processes: the world of a run, and how it is started."""
