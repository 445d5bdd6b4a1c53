"""Rollouts: sampling of responses with a KV cache, their log-probs, texts and metrics."""
