"""A whole update on fake CUDA tensors: device stage, forward, backward, clipping, optimiser, EMA, without a GPU.

Fake tensors refuse operands on two devices, and reads of values; the recorder sees transfers and the types of products.
"""

import functools
from unittest import mock

import pytest
import torch

from benchmarks.described_gpu import DEVICE, described_gpu, to_fake
from benchmarks.kernel_counts import EagerKernels
from engine.build import prepare_model
from engine.distributed.processes import Processes
from tests.engine import test_no_device_waits
from tests.engine.test_no_device_waits import CPU, batches, parts
from tests.helpers.small_models import SMALLEST, shrunken

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by copy.deepcopy
PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


make_tensor = torch.tensor


def upload(*args, device=None, **options):
    """Make a tensor from host numbers, and then copy it: torch.tensor itself would ask the driver."""
    return make_tensor(*args, **options).to(device or CPU)


@functools.cache
def update(name, precision):
    """Return the recorder of an update, of two micro-batches of four images, and the state after it."""
    model = shrunken(name, depths=(1, 1, 1, 1), drop_path_rate=0.3, drop_rate=0.1)
    model = prepare_model(model, Processes(0, 1, 0, CPU, "test"))
    prepared = mock.patch.object(test_no_device_waits, "prepare_model", lambda model, processes: model)
    uploads = mock.patch.object(torch, "tensor", upload)
    with described_gpu() as mode, mode, prepared, uploads:
        loop, state, statistics = parts(to_fake(model, mode), DEVICE, opts=("TRAIN.AMP", precision))
        with EagerKernels() as recorder:
            loop._train_update(state, batches(), statistics)
    return recorder, state


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SMALLEST)
def test_update_on_fake_cuda_stays_there_in_its_precision(name, precision):
    recorder, state = update(name, precision)
    assert recorder.reads == []
    assert recorder.transfers == ["_to_copy"] * 8  # images, labels, indices and boxes of two micro-batches
    tensors = [*state.model.state_dict().values(), *state.ema.module.state_dict().values()]
    assert {tensor.device for tensor in tensors} == {DEVICE}
    wide = [k for k in recorder.kernels if k.kind in ("products", "convolutions", "attention") and not k.lowered]
    assert bool(wide) == (precision == "off"), wide
