"""Checkpoint files, their asynchronous saver and the run directory."""
