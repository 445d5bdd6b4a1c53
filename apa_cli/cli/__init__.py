"""The commands: compose, check, hand over; errors in one line."""
