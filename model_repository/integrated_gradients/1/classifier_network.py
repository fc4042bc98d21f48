"""The classifier as the engine sees it, and the forward and backward pass of one chunk of rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# float16 underflows below 6e-8, and gradients with respect to early features get that small.
FLOAT16_GRADIENT_SCALE = 64.0
# What PyTorch's notes on CUDA graphs ask for before a capture, on a stream of its own.
CAPTURE_WARMUPS = 3


class Network:
    """A classifier as ``tail(stem(images)) = logits``, with ``stem`` affine or absent.

    Args:
        module: returns logits [n, classes], or a tuple that begins with them, and may have the methods ``stem`` and
            ``tail``, and the submodule ``stem_layers`` that ``stem`` calls, as `tools/export` writes them into
            TorchScript files.
        precision: dtype of the tail's passes over rows; ``torch.float16`` (CUDA only) keeps the stem and the sums in
            float32. None: the module's own.
    """

    def __init__(self, module: Callable[..., Any], precision: torch.dtype | None = None) -> None:
        self.module = module
        self.precision = precision
        self.hoists = hasattr(module, "stem") and hasattr(module, "tail")
        self._row_module = module if precision is None else copy.deepcopy(module).to(precision)
        # A hoisted stem is evaluated so rarely that float64 costs nothing there. Most of a network's activations come
        # right after it, and rounding that flips one of them is most of what separates float32 from float64.
        stem_layers = getattr(module, "stem_layers", None) if self.hoists else None
        self._float64_stem = None if stem_layers is None else copy.deepcopy(stem_layers).double()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, ...]."""
        return _logits(self.module(images))

    def stem(self, images: Tensor) -> Tensor:
        """Features of images [n, ...], float64 where the stem is known; the images themselves where there is none."""
        if not self.hoists:
            return images
        return self.module.stem(images) if self._float64_stem is None else self._float64_stem(images.double())

    def transposed_stem(self, gradients: Tensor, images: Tensor) -> Tensor:
        """Gradients with respect to ``stem(images)`` [n, ...] -> gradients with respect to ``images``."""
        if not self.hoists:
            return gradients
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            (pulled_back,) = torch.autograd.grad(self.module.stem(images), images, gradients)
        return pulled_back

    def row_gradients(self, features: Tensor, classes: Tensor, signs: Tensor, on_probability: Tensor) -> Tensor:
        """Gradients of each row's objective with respect to its features.

        Args:
            features: [rows, ...].
            classes: int64 [rows, 2], the two classes whose combination is explained.
            signs: float [rows, 2], their factors in it.
            on_probability: bool [rows, 1], whether it combines probabilities instead of logits.

        Raises:
            UnsupportedOutputError: the network does not return [rows, classes].
        """
        features = features.detach().to(self.precision or features.dtype).requires_grad_()
        with torch.enable_grad():
            logits = _logits(self._row_module.tail(features) if self.hoists else self._row_module(features))
        if logits.dim() != 2:
            raise UnsupportedOutputError
        probabilities = logits.detach().to(signs.dtype).softmax(dim=1)
        direction = torch.zeros_like(probabilities).scatter_add_(1, classes, signs)
        through_softmax = probabilities * (direction - (probabilities * direction).sum(dim=1, keepdim=True))
        objective = torch.where(on_probability, through_softmax, direction)
        if self.precision != torch.float16:
            (gradients,) = torch.autograd.grad(logits, features, objective.to(logits.dtype))
            return gradients
        (gradients,) = torch.autograd.grad(logits, features, (FLOAT16_GRADIENT_SCALE * objective).to(logits.dtype))
        return gradients.float() / FLOAT16_GRADIENT_SCALE


class UnsupportedOutputError(Exception):
    """The network does not return one row of class scores for each image."""


def _logits(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


class CapturedRows:
    """``Network.row_gradients`` as CUDA graphs: one for each of a few row counts, replayed without launch costs.

    A chunk is padded to the next count with rows whose signs are zero. The gradients returned are overwritten by the
    next call.
    """

    def __init__(self, network: Network, max_rows: int) -> None:
        self._network = network
        self._counts = sorted({max(1, max_rows >> shift) for shift in range(4)})
        self._captured: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, features: Tensor, classes: Tensor, signs: Tensor, on_probability: Tensor) -> Tensor:
        rows = len(features)
        count = next(count for count in self._counts if count >= rows)
        arguments = (features, classes, signs, on_probability)
        key = (count, *features.shape[1:])
        if key not in self._captured:
            self._captured[key] = self._capture(count, arguments)
        graph, inputs, gradients = self._captured[key]
        for place, argument in zip(inputs, arguments):
            place[:rows].copy_(argument)
        inputs[2][rows:].zero_()
        graph.replay()
        return gradients[:rows]

    def _capture(
        self, count: int, arguments: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        inputs = tuple(
            torch.zeros_like(tensor[:1]).expand(count, *tensor.shape[1:]).clone(memory_format=_memory_format(tensor))
            for tensor in arguments
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARMUPS):
                self._network.row_gradients(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients = self._network.row_gradients(*inputs)
        return graph, inputs, gradients


def _memory_format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
