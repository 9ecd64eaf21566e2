"""Augmentation, on the CPU and on the device: crops, RandAugment, random erasing, mixup."""
