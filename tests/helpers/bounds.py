"""Bounds of round-off that follow from the arithmetic, not from one CPU's numbers.

Bitwise equality is for the same kernels on the same shapes with the same number of threads. Everything else (another order of
a sum, other vector instructions, another formulation) is compared within `ulps(terms)` of the sum of the terms' magnitudes.
"""

import torch

# Options of runs whose weights are compared although their sums ran in another order. AdamW divides by the square root of the
# mean square + EPS: with the usual 1e-8 it makes a whole step of LR out of a gradient that is zero but for rounding (a bias
# before a BatchNorm, the bias of the keys of an attention). In general a change of the gradient becomes LR / EPS of it.
CONDITIONED = ("OPTIM.EPS", "1")
TERMS = 16  # partial sums of a gradient: micro-batches, processes, threads and vectors of a kernel
DEPTH = 40  # layers of the small models one after another


def ulps(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest change of a sum with the order of its terms, relative to the sum of their magnitudes."""
    return terms * torch.finfo(dtype).eps


def assert_same_but_for_order(got, want, lr_sum=0.08, norm=5.0):
    """Check weights and BatchNorm statistics of two CONDITIONED runs whose sums ran in another order.

    A gradient of up to `norm` (5: CLIP_GRAD of small_cfg) differs by TERMS ulps of it, a weight by `lr_sum`, the sum of the
    LRs, of that. Activations, and so the statistics, gather an ulp of their size of about 1 in each layer. A gradient wrong by
    a tenth moves the weights by more than ten times this after 20 updates.
    """
    atol = lr_sum * norm * ulps(TERMS) + ulps(DEPTH)
    torch.testing.assert_close(got, want, rtol=DEPTH * ulps(TERMS), atol=atol)
