"""Use of a trained policy: evaluation, chat, export."""
