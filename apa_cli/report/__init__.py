"""Reading finished runs: their curves, and comparisons of many of them."""
