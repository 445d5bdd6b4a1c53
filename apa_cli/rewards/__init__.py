"""Rewards: text in, scores out."""
