"""The machine: memory, matrix products, roofline."""
