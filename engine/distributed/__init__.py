"""Processes of a run: launch, DDP, consensus, signals, elastic restarts."""
