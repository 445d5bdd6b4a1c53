"""Sampling responses: random numbers in, tokens, log-probs and texts out."""
