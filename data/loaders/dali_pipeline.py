"""DALI pipeline: from encoded images and their drawn augmentation to uint8 crops. Imports nvidia.dali: import it late.

It is fed batch by batch and keeps no position in the epoch: after an epoch that is abandoned only the batches in flight
remain, which the next run discards, and a resumed run only feeds other images.
"""

# B images in a batch, S side of the crops

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, types
from torch import Tensor

DEPTH = 2  # batches in flight


class PipelineBatch(Protocol):
    """Inputs of the pipeline for one batch."""

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Return regions (B, 4) to decode, sizes (B, 2) to resize them to, crops (B, 4) of those, cubic and flips (B,)."""

    def files(self) -> list[np.ndarray]:
        """Return the encoded images, uint8 each."""


B = TypeVar("B", bound=PipelineBatch)


class Pipeline:
    """Decode, resize, crop and flip batches of up to `batch` images on the CPU or on a GPU."""

    def __init__(self, batch: int, threads: int, gpu: int | None) -> None:
        """`gpu` is the number of the device, None for the CPU backend."""
        self.gpu, self.broken = gpu, False
        self._runs, self._waiting = 0, DEPTH
        self._pipe = dali.Pipeline(batch, max(1, threads), device_id=gpu, prefetch_queue_depth=DEPTH, exec_dynamic=True)
        with self._pipe:
            self._pipe.set_outputs(self._graph())
        self._pipe.build()
        self._warm_up()

    def _graph(self) -> Any:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        given = {
            name: fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("regions", "sizes", "crops")
        }
        cubic, flips = (fn.external_source(name=name, dtype=types.INT32, ndim=0) for name in ("cubic", "flips"))
        pixels = fn.decoders.image_slice(
            files,
            given["regions"][0:2],
            given["regions"][2:4],
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            device="cpu" if self.gpu is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as libjpeg and the CPU backend do
        )
        linear, cubic_type = int(types.INTERP_LINEAR), int(types.INTERP_CUBIC)
        interpolation = fn.cast(linear + cubic * (cubic_type - linear), dtype=types.INTERP_TYPE)
        pixels = fn.resize(
            pixels, size=fn.cast(given["sizes"], dtype=types.FLOAT), interp_type=interpolation, antialias=True
        )
        pixels = fn.slice(pixels, given["crops"][0:2], given["crops"][2:4], axes=(0, 1))
        return fn.flip(pixels, horizontal=flips)

    def run(self, batches: Iterable[B]) -> Iterator[tuple[B, Tensor]]:
        """Yield each batch with its crops, uint8 (B, 3, S, S), channels last, on the backend's device.

        If DALI cannot decode a file, it raises RuntimeError, and the pipeline stays `broken`.
        """
        self._drain()  # batches of an abandoned run
        self._runs += 1
        own, in_flight = self._runs, deque[B]()
        try:
            for batch in batches:
                self._feed(batch)
                in_flight.append(batch)
                if len(in_flight) == DEPTH:
                    yield in_flight.popleft(), self._take()
                if own != self._runs:
                    return  # another run has begun
            while in_flight:
                yield in_flight.popleft(), self._take()
        finally:
            if own == self._runs:
                self._drain()

    def _drain(self) -> None:
        while self._waiting and not self.broken:
            self._take()

    def _warm_up(self) -> None:
        """Run DEPTH batches of one pixel: the first run of DALI waits for that many, later runs do not."""
        pixel = np.frombuffer(b"P6\n1 1\n255\n\0\0\0", dtype=np.uint8)
        one = np.array([0, 0, 1, 1], dtype=np.int32)
        given = {"regions": one, "sizes": one[2:], "crops": one, "cubic": one[0], "flips": one[0]}
        for _ in range(DEPTH):
            self._pipe.feed_input("files", [pixel])
            for name, value in given.items():
                self._pipe.feed_input(name, [value])
        self._pipe.schedule_run()
        self._drain()

    def _feed(self, batch: PipelineBatch) -> None:
        self._pipe.feed_input("files", batch.files())
        for name, values in batch.inputs.items():
            self._pipe.feed_input(name, list(values.astype(np.int32)))
        self._pipe.schedule_run()
        self._waiting += 1

    def _take(self) -> Tensor:
        self.broken = True
        (crops,) = self._pipe.share_outputs(*([] if self.gpu is None else [torch.cuda.current_stream(self.gpu)]))
        pixels = torch.from_dlpack(crops.as_tensor()).clone()  # (B, S, S, 3); DALI reuses its memory
        self._pipe.release_outputs()
        self.broken, self._waiting = False, self._waiting - 1
        return pixels.permute(0, 3, 1, 2)
