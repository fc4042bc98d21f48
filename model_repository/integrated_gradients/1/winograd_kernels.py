"""Winograd's F(4 x 4, 3 x 3): 3 x 3 convolutions of stride 1 on a CPU.

A 4 x 4 tile of outputs takes 36 products of each pair of channels instead of 144 (Lavin & Gray, arXiv 1509.09308). The
input's tiles are transformed (36 values for each channel of a tile), 36 matrix products take the place of the
convolution, and their results are transformed back. Transforms move much memory, so where the channels are few all
three run over blocks of tiles that stay in the processor's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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
    """Transform tiles ``start`` to ``stop`` of images [n, height, width, channels], padded by 1, to values.

    Values are [36, tiles, channels]; tile ``first`` has place 0 there.
    """
    _, height, width, channels = images.shape
    read, half, written = scratch
    for tile in range(start, stop):
        image, top, left = _tile(tile, height, width)
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
                    values[product, tile - first, channel + lane] = written[product * LANES + lane]


@compiled
def _finish_tiles(
    products: Floats, bias: Floats, outputs: Floats, scratch: Scratch, first: int, start: int, stop: int
) -> None:
    """The reverse: products to tiles of outputs [n, height, width, channels], with the bias."""
    _, height, width, channels = outputs.shape
    read, half, written = scratch
    for tile in range(start, stop):
        image, top, left = _tile(tile, height, width)
        for channel in range(0, channels, LANES):
            for product in range(PRODUCTS):
                for lane in range(LANES):
                    read[product * LANES + lane] = products[product, tile - first, channel + lane]
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
        last = min(first + size, stop)
        # As numbers that Numba knows, places would be another type, for which it compiles everything again.
        _transform_tiles(images, values, scratch, first, first, last)
        for product in range(PRODUCTS):
            np.dot(values[product, : last - first], weights[product], products[product, : last - first])
        _finish_tiles(products, bias, outputs, scratch, first, first, last)


def transform_weights(weights: Tensor) -> Tensor:
    """Weights [outputs, channels, 3, 3] -> [36, channels, outputs], in float32."""
    places = weights.detach().permute(2, 3, 1, 0).reshape(9, -1)
    both = torch.from_numpy(np.kron(WEIGHT_TRANSFORM, WEIGHT_TRANSFORM)).float()  # of rows and of columns
    return (both @ places).view(PRODUCTS, weights.shape[1], -1)


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
