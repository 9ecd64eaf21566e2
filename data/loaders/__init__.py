"""Loaders and the sampler that drives them: PyTorch workers, DALI, synthetic images."""
