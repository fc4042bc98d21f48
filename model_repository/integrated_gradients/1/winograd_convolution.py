"""Which convolutions of a pass on a CPU, and which of their input gradients, Winograd's algorithm serves.

Those that it made faster when they were timed. ``winograd_kernels`` computes them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from winograd_kernels import LANES, PRODUCTS, Threads, for_input_gradients, transform_weights

# Weights take four times their memory once transformed; those of larger layers stay as they are.
MOST_WEIGHT_BYTES = 40 << 20
# A layer is convolved directly unless this is faster by so much, on the fastest of so many runs. They take turns: other
# models load at the same time.
LEAST_GAIN, TIMED_RUNS = 1.05, 6


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
        # Whether it is faster, by the shapes of images and weights: networks repeat them, and only the first is timed.
        self._faster: dict[tuple[torch.Size, torch.Size, bool], bool] = {}
        self._outer: WinogradConvolutions | None = None
        self._measures = False

    def __enter__(self) -> None:
        self._outer, _entered.convolutions = getattr(_entered, "convolutions", None), self

    def __exit__(self, *_: object) -> None:
        _entered.convolutions = self._outer

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Choose a way for each layer that is met and is not known yet; the first of a shape is timed both ways."""
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
            self._layers[key] = weights, self._if_faster(images, given, bias, is_backward, direct)
        _, transformed = self._layers.get(key, (weights, None))
        return direct() if transformed is None else self._threads.convolve(images, transformed, bias)

    def _if_faster(
        self, images: Tensor, weights: Tensor, bias: Tensor | None, is_backward: bool, direct: Callable[[], Tensor]
    ) -> Tensor | None:
        """The transformed weights of a convolution, or None if it should stay as it is."""
        shapes = images.shape, weights.shape, is_backward
        if 4 * PRODUCTS * weights.shape[0] * weights.shape[1] > MOST_WEIGHT_BYTES or not self._faster.get(shapes, True):
            return None
        transformed = transform_weights(weights)
        if shapes in self._faster:
            return transformed

        def seconds(run: Callable[[], Tensor]) -> float:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        def winograd() -> Tensor:
            return self._threads.convolve(images, transformed, bias)

        pairs = [(seconds(direct), seconds(winograd)) for _ in range(TIMED_RUNS)]
        directly, by_winograd = map(min, zip(*pairs))
        self._faster[shapes] = directly >= LEAST_GAIN * by_winograd
        return transformed if self._faster[shapes] else None


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
