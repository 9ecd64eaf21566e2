"""Optimisers, learning rate schedule, EMA, clipping."""
