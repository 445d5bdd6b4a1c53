"""The commands: compose and check the configuration, run the task, print errors in one line."""
