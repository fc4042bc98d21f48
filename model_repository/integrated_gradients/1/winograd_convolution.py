"""Winograd's F(4 x 4, 3 x 3) for the 3 x 3 convolutions of stride 1 in a pass on a CPU, and for their input gradients.

A 4 x 4 tile of outputs takes 36 products of each pair of channels instead of 144 (Lavin & Gray, arXiv 1509.09308). The
input's tiles are transformed (36 values for each channel of a tile), 36 matrix products take the place of the
convolution, and their results are transformed back. Transforms move much memory, so where the channels are few all
three run over blocks of tiles that stay in the processor's cache.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Numba's products are SciPy's; the threads here share the work
from numba import njit

Floats = npt.NDArray[np.float32]
Scratch = tuple[Floats, Floats, Floats]

TILE, SIDE, PRODUCTS = 4, 6, 36
# Channels that are transformed together: their 36 values stay in the first-level cache.
LANES = 32
# Bytes of a block's transformed tiles and products, for each thread: less than a second-level cache of 1 MB.
BLOCK_BYTES = 900_000
# Layers of more channels transform all tiles before the products, whose weights would otherwise be read for each block.
MOST_BLOCK_CHANNELS = 128
# Weights take four times their memory once transformed; those of larger layers stay as they are.
MOST_WEIGHT_BYTES = 40 << 20
# A layer is convolved directly unless this is faster by so much, on the faster of so many runs.
LEAST_GAIN, TIMED_RUNS = 1.1, 3

# The transforms B, G and A of the paper, for the points 0, 1, -1, 2, -2.
INPUT_ROWS = [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0]
INPUT_TRANSFORM = np.array([*INPUT_ROWS, [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]], np.float32)
WEIGHT_TRANSFORM = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
OUTPUT_ROWS = [1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]
OUTPUT_TRANSFORM = np.array(OUTPUT_ROWS, np.float32)
# Products with 0 are left out, which only `fastmath` allows. There is no comparison of values, so NaNs still spread.
compiled = njit(fastmath=True, nogil=True, boundscheck=False, error_model="numpy")


def _lines(transform: Floats) -> Callable[..., None]:
    """A function that transforms lines of six values, each of ``LANES``, in a square of six by six places.

    The values of a line are ``step`` places apart, and lines ``apart``.
    """
    rows, columns = transform.shape

    @compiled
    def transform_lines(given: Floats, result: Floats, lines: int, step: int, apart: int) -> None:
        for line in range(lines):
            for row in range(rows):
                for lane in range(LANES):
                    total = np.float32(0)
                    for column in range(columns):
                        total += transform[row, column] * given[(line * apart + column * step) * LANES + lane]
                    result[(line * apart + row * step) * LANES + lane] = total

    return transform_lines


_transform_lines, _finish_lines = _lines(INPUT_TRANSFORM), _lines(OUTPUT_TRANSFORM)


@compiled
def _tile(number: int, height: int, width: int) -> tuple[int, int, int]:
    """Image of a tile, and its first row and column."""
    down, across = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    place = number % (down * across)
    return number // (down * across), TILE * (place // across), TILE * (place % across)


@compiled
def _transform_tiles(images: Floats, values: Floats, scratch: Scratch, first: int, start: int, stop: int) -> None:
    """Transform tiles of images [n, height, width, channels], padded by 1, to places ``start`` to ``stop`` of values.

    Values are [36, tiles, channels]; the tile of place 0 is ``first``.
    """
    _, height, width, channels = images.shape
    read, half, written = scratch
    for place in range(start, stop):
        image, top, left = _tile(first + place, height, width)
        for channel in range(0, channels, LANES):
            for row in range(SIDE):
                y = top + row - 1
                for column in range(SIDE):
                    x, at = left + column - 1, (row * SIDE + column) * LANES
                    if 0 <= y < height and 0 <= x < width:
                        for lane in range(LANES):
                            read[at + lane] = images[image, y, x, channel + lane]
                    else:
                        for lane in range(LANES):
                            read[at + lane] = 0
            _transform_lines(read, half, SIDE, SIDE, 1)
            _transform_lines(half, written, SIDE, 1, SIDE)
            for product in range(PRODUCTS):
                for lane in range(LANES):
                    values[product, place, channel + lane] = written[product * LANES + lane]


@compiled
def _finish_tiles(
    products: Floats, bias: Floats, outputs: Floats, scratch: Scratch, first: int, start: int, stop: int
) -> None:
    """The reverse: places of products to tiles of outputs [n, height, width, channels], with the bias."""
    _, height, width, channels = outputs.shape
    read, half, written = scratch
    for place in range(start, stop):
        image, top, left = _tile(first + place, height, width)
        for channel in range(0, channels, LANES):
            for product in range(PRODUCTS):
                for lane in range(LANES):
                    read[product * LANES + lane] = products[product, place, channel + lane]
            _finish_lines(read, half, SIDE, SIDE, 1)
            _finish_lines(half, written, TILE, 1, SIDE)
            for row in range(min(TILE, height - top)):
                for column in range(min(TILE, width - left)):
                    at = (row * SIDE + column) * LANES
                    for lane in range(LANES):
                        found = written[at + lane] + bias[channel + lane]
                        outputs[image, top + row, left + column, channel + lane] = found


@compiled
def _convolve_blocks(
    images: Floats, weights: Floats, bias: Floats, outputs: Floats, buffers: Any, start: int, stop: int
) -> None:
    """Tiles ``start`` to ``stop``, in blocks of as many as ``values`` has places for."""
    values, products, scratch = buffers
    size = values.shape[1]
    for first in range(start, stop, size):
        tiles = min(size, stop - first)
        _transform_tiles(images, values, scratch, first, 0, tiles)
        for product in range(PRODUCTS):
            np.dot(values[product, :tiles], weights[product], products[product, :tiles])
        _finish_tiles(products, bias, outputs, scratch, first, 0, tiles)


def transform_weights(weights: Tensor) -> Tensor:
    """Weights [outputs, channels, 3, 3] -> [36, channels, outputs], in float32."""
    transform = torch.from_numpy(WEIGHT_TRANSFORM)
    transformed = transform @ weights.detach().double() @ transform.T
    return transformed.permute(2, 3, 1, 0).reshape(PRODUCTS, weights.shape[1], -1).float().contiguous()


def for_input_gradients(weights: Tensor) -> Tensor:
    """The weights of the convolution that takes a convolution's output gradients to its input gradients."""
    return weights.detach().flip(2, 3).transpose(0, 1)


class Threads:
    """Threads that share the tiles of a convolution; the caller's is one of them.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(max(1, count - 1), "winograd")
        self._buffers: list[tuple[Any, dict[str, Floats]]] = [
            (tuple(np.empty((3, PRODUCTS * LANES), np.float32)), {}) for _ in range(count)
        ]
        self._shared: dict[str, Floats] = {}

    def convolve(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve images [n, channels, height, width] with transformed weights [36, channels, outputs]."""
        count, channels, height, width = images.shape
        kernels = weights.shape[2]
        outputs = torch.empty((count, kernels, height, width), memory_format=torch.channels_last)
        given = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).numpy()
        written = outputs.permute(0, 2, 3, 1).numpy()
        added = np.zeros(kernels, np.float32) if bias is None else bias.detach().contiguous().numpy()
        tiles = count * -(-height // TILE) * -(-width // TILE)
        shares = [tiles * share // self._count for share in range(self._count + 1)]
        if channels <= MOST_BLOCK_CHANNELS:
            size = max(1, BLOCK_BYTES // (4 * PRODUCTS * (channels + kernels)))
            matrices = weights.numpy()

            def blocks(thread: int) -> None:
                scratch, kept = self._buffers[thread]
                values, products = _buffer(kept, "values", size, channels), _buffer(kept, "products", size, kernels)
                start, stop = shares[thread], shares[thread + 1]
                _convolve_blocks(given, matrices, added, written, (values, products, scratch), start, stop)

            self._each(blocks)
            return outputs
        values, products = (
            _buffer(self._shared, name, tiles, size) for name, size in (("values", channels), ("products", kernels))
        )
        self._each(lambda i: _transform_tiles(given, values, self._buffers[i][0], 0, shares[i], shares[i + 1]))
        torch.bmm(torch.from_numpy(values), weights, out=torch.from_numpy(products))
        self._each(lambda i: _finish_tiles(products, added, written, self._buffers[i][0], 0, shares[i], shares[i + 1]))
        return outputs

    def _each(self, work: Callable[[int], object]) -> None:
        others = [self._pool.submit(work, thread) for thread in range(1, self._count)]
        try:
            work(0)
        finally:
            wait(others)  # nobody must write when this returns, or raises
        for other in others:
            other.result()


def _buffer(kept: dict[str, Floats], name: str, tiles: int, channels: int) -> Floats:
    """Memory [36, tiles, channels] of one that is kept by its name, and grows."""
    size = PRODUCTS * tiles * channels
    if name not in kept or kept[name].size < size:
        kept[name] = np.empty(size, np.float32)
    return kept[name][:size].reshape(PRODUCTS, tiles, channels)


class WinogradConvolutions:
    """A context manager: convolutions of its thread that Winograd's algorithm made faster when measured are done so.

    One thread may enter it at a time. Weights must not change.

    Args:
        threads: how many; absent, those of PyTorch.
    """

    def __init__(self, threads: int | None = None) -> None:
        _register_kernels()
        self._threads = Threads(threads or torch.get_num_threads())
        # By the place of its weights and whether it is the backward pass: the weights, so that no others take their
        # place, and the transformed ones, or None if it is done directly.
        self._layers: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        self._outer: WinogradConvolutions | None = None
        self._measures = False

    def __enter__(self) -> None:
        self._outer, _entered.convolutions = getattr(_entered, "convolutions", None), self

    def __exit__(self, *_: object) -> None:
        _entered.convolutions = self._outer

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Time both ways of each layer that is met and is not known yet, and choose."""
        self._measures = True
        try:
            yield
        finally:
            self._measures = False

    @property
    def layers(self) -> int:
        """Layers that Winograd's algorithm serves; a layer and its input gradients count as two."""
        return sum(transformed is not None for _, transformed in self._layers.values())

    def forward(
        self, direct: Callable[[], Tensor], images: Tensor, weights: Tensor, bias: Any, *geometry: Any
    ) -> Tensor:
        """``aten::convolution``."""
        if not fits(images, weights, geometry) or (bias is not None and bias.dtype != torch.float32):
            return direct()
        return self._convolve(images, weights, bias, False, direct)

    def backward(
        self, direct: Callable[[], Any], gradients: Tensor, images: Tensor, weights: Tensor, sizes: Any, *geometry: Any
    ) -> Any:
        """``aten::convolution_backward``; the last of ``geometry`` says which gradients are wanted."""
        if list(geometry[-1]) != [True, False, False] or not fits(gradients, weights, geometry[:-1]):
            return direct()
        return self._convolve(gradients, weights, None, True, lambda: direct()[0]), None, None

    def _convolve(
        self, images: Tensor, weights: Tensor, bias: Tensor | None, is_backward: bool, direct: Callable[[], Tensor]
    ) -> Tensor:
        key = weights.data_ptr(), weights.shape, weights.stride(), is_backward
        if self._measures and key not in self._layers:
            given = for_input_gradients(weights) if is_backward else weights
            self._layers[key] = weights, self._if_faster(images, given, bias, direct)
        _, transformed = self._layers.get(key, (weights, None))
        return direct() if transformed is None else self._threads.convolve(images, transformed, bias)

    def _if_faster(
        self, images: Tensor, weights: Tensor, bias: Tensor | None, direct: Callable[[], Tensor]
    ) -> Tensor | None:
        """The transformed weights of a convolution, or None if it should stay as it is."""
        if 4 * PRODUCTS * weights.shape[0] * weights.shape[1] > MOST_WEIGHT_BYTES:
            return None
        transformed = transform_weights(weights)

        def seconds(run: Callable[[], Tensor]) -> float:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        def winograd() -> Tensor:
            return self._threads.convolve(images, transformed, bias)

        winograd()  # the first run also gets memory
        best = {run: min(seconds(run) for _ in range(TIMED_RUNS)) for run in (direct, winograd)}
        return transformed if best[direct] >= LEAST_GAIN * best[winograd] else None


_entered = threading.local()


@cache
def _register_kernels() -> torch.library.Library:
    """Register kernels of convolutions on a CPU, which are PyTorch's but where a ``WinogradConvolutions`` is entered.

    A dispatch mode would need no registration, but takes part in every operator: 8 % of a pass.
    """
    library = torch.library.Library("aten", "IMPL")
    for name, method in (
        ("convolution", WinogradConvolutions.forward),
        ("convolution_backward", WinogradConvolutions.backward),
    ):
        original = torch.library.get_kernel(f"aten::{name}", "CPU")

        def kernel(keys: Any, *arguments: Any, original: Any = original, method: Any = method) -> Any:
            def direct() -> Any:
                return original.call_boxed(keys, *arguments)

            entered = getattr(_entered, "convolutions", None)
            return direct() if entered is None else method(entered, direct, *arguments)

        library.impl(name, kernel, "CPU", with_keyset=True)
    return library


def fits(images: Tensor, weights: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether this is a 3 x 3 convolution of stride 1 that keeps the size, of float32 and whole runs of channels.

    Images or weights must be channels_last: then PyTorch's outputs are, too.

    Args:
        images: inputs [n, channels, height, width], or output gradients.
        weights: [outputs, channels, 3, 3].
        geometry: stride, padding, dilation, whether it is transposed, padding of the output, groups.
    """
    stride, padding, dilation, is_transposed, _, groups = geometry
    return (
        images.dim() == 4
        and images.dtype == weights.dtype == torch.float32
        and images.device.type == "cpu"
        and not is_transposed
        and groups == 1
        and tuple(weights.shape[2:]) == (3, 3)
        and all(list(each) == [1, 1] for each in (stride, padding, dilation))
        and not any(channels % LANES for channels in weights.shape[:2])
        and any(each.is_contiguous(memory_format=torch.channels_last) for each in (images, weights))
    )
