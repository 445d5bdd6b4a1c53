"""What is done with a trained policy: evaluation, chat, export."""
