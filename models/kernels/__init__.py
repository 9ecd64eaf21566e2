"""Operators with hand-written backward passes, Triton kernels and apex."""
