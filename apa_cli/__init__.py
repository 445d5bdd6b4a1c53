"""apa-cli: reinforcement learning from human feedback with a learned critic, from the command line."""

__version__ = "0.1.0"
