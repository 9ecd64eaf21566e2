"""Messages between processes: JSON as bytes in a tensor, of bounded length. Nothing that is received is unpickled."""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BYTES = 2**26  # of one message; the longest, lists of unreadable images, have a few hundred bytes for each


def encode(value: Any) -> Tensor:
    """Return a value of JSON's types as uint8 (bytes,). Raises TypeError for any other value."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def decode(message: Tensor) -> Any:
    """Return the value of a message; tuples have become lists."""
    return json.loads(bytes(message.numpy()))


def broadcast(value: Any, is_source: bool, group: dist.ProcessGroup | None) -> Any:
    """Return the value of process 0 on every process of a group for CPU tensors; that of others is ignored.

    Raises ValueError on all of them if its message is longer than MAX_BYTES.
    """
    message = encode(value) if is_source else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(message)])
    dist.broadcast(length, src=0, group=group)
    size = _check_length(int(length))
    if not is_source:
        message = torch.empty(size, dtype=torch.uint8)
    dist.broadcast(message, src=0, group=group)
    return decode(message)


def gather(value: Any, world: int, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the values of all processes of a group for CPU tensors, in order of rank, on every process.

    Raises ValueError on all of them if one's message is longer than MAX_BYTES.
    """
    message = encode(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(message)]), group=group)
    sizes = [_check_length(int(length)) for length in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(message)] = message
    messages = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(messages, padded, group=group)
    return [decode(received[:size]) for received, size in zip(messages, sizes, strict=True)]


def _check_length(length: int) -> int:
    if not 0 < length <= MAX_BYTES:
        raise ValueError(f"a message between processes has {length} bytes; at most {MAX_BYTES} are exchanged")
    return length
