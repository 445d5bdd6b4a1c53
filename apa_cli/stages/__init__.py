"""The stages before RL, supervised fine-tuning and the reward model, run by their commands or on demand."""
