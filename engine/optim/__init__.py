"""Optimisers: parameter groups, schedules, EMA, gradient clipping, skipped updates."""
