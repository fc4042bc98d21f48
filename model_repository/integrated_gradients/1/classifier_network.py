"""The classifier as the engine sees it, and the forward and backward pass of one chunk of rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# float16 underflows below 6e-8, and gradients with respect to early features get that small.
FLOAT16_GRADIENT_SCALE = 64.0
# What PyTorch's notes on CUDA graphs ask for before a capture, on a stream of its own.
CAPTURE_WARMUPS = 3
# Besides eighths of the largest: the default number of steps.
USUAL_ROW_COUNTS = (50,)


@dataclass(frozen=True)
class Rows:
    """The inputs of a pass.

    ``features`` [rows, ...]; ``classes`` int64 [rows, 2], the two classes whose combination each row explains;
    ``signs`` [rows, 2], their factors in it; ``on_probability`` bool [rows, 1], whether it combines probabilities
    instead of logits.
    """

    features: Tensor
    classes: Tensor
    signs: Tensor
    on_probability: Tensor

    @classmethod
    def like(cls, features: Tensor, dtype: torch.dtype, count: int) -> Rows:
        """Zeros for ``count`` rows of features as in ``features`` [1, ...]."""
        place = {"device": features.device}
        shape = (count, *features.shape[1:])
        zeros = torch.zeros(shape, dtype=dtype, **place)
        if features.is_contiguous(memory_format=memory_format(features)):
            zeros = zeros.contiguous(memory_format=memory_format(features))
        return cls(
            zeros,
            torch.zeros(count, 2, dtype=torch.int64, **place),
            torch.zeros(count, 2, dtype=dtype, **place),
            torch.zeros(count, 1, dtype=torch.bool, **place),
        )

    def __getitem__(self, rows: slice) -> Rows:
        """Views of some rows."""
        return Rows(self.features[rows], self.classes[rows], self.signs[rows], self.on_probability[rows])


class Network:
    """A classifier as ``tail(stem(images)) = logits``, with ``stem`` affine or absent.

    Args:
        module: returns logits [n, classes], or a tuple that begins with them, and may have the methods ``stem`` and
            ``tail``, and the submodule ``stem_layers`` that ``stem`` calls, as `tools/export` writes them into
            TorchScript files.
        precision: dtype of the tail's passes over rows; ``torch.float16`` (CUDA only) keeps the stem and the sums in
            float32. None: the module's own.
        float64_stem: evaluate a stem whose layers are known in float64.
    """

    def __init__(
        self, module: Callable[..., Any], precision: torch.dtype | None = None, float64_stem: bool = True
    ) -> None:
        self.module = module
        self.precision = precision
        self.hoists = hasattr(module, "stem") and hasattr(module, "tail")
        self._row_module = module if precision is None else copy.deepcopy(module).to(precision)
        # A hoisted stem is evaluated so rarely that float64 costs nothing there. Most of a network's activations come
        # right after it, and rounding that flips one of them is most of what separates float32 from float64.
        stem_layers = getattr(module, "stem_layers", None) if self.hoists and float64_stem else None
        self._float64_stem = None if stem_layers is None else copy.deepcopy(stem_layers).double()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, ...]."""
        return _logits(self.module(images))

    def stem(self, images: Tensor) -> Tensor:
        """Features of images [n, ...], float64 where the stem is known; the images themselves where there is none."""
        if not self.hoists:
            return images
        features = self.module.stem(images) if self._float64_stem is None else self._float64_stem(images.double())
        return features.contiguous(memory_format=memory_format(features))

    def transposed_stem(self, gradients: Tensor, images: Tensor) -> Tensor:
        """Gradients with respect to ``stem(images)`` [n, ...] -> gradients with respect to ``images``."""
        if not self.hoists:
            return gradients
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            (pulled_back,) = torch.autograd.grad(self.module.stem(images), images, gradients)
        return pulled_back

    def row_gradients(self, rows: Rows) -> Tensor:
        """Gradients of each row's objective with respect to its features, shaped like those.

        Raises:
            UnsupportedOutputError: the network does not return [rows, classes].
        """
        features = rows.features.detach().to(self.precision or rows.features.dtype).requires_grad_()
        # TorchScript's optimiser, left on, differentiates parts of the network by itself, in more passes over memory.
        with torch.enable_grad(), torch.jit.optimized_execution(False):
            logits = _logits(self._row_module.tail(features) if self.hoists else self._row_module(features))
        if logits.dim() != 2:
            raise UnsupportedOutputError
        probabilities = logits.detach().to(rows.signs.dtype).softmax(dim=1)
        direction = torch.zeros_like(probabilities).scatter_add_(1, rows.classes, rows.signs)
        through_softmax = probabilities * (direction - (probabilities * direction).sum(dim=1, keepdim=True))
        objective = torch.where(rows.on_probability, through_softmax, direction)
        if self.precision != torch.float16:
            (gradients,) = torch.autograd.grad(logits, features, objective.to(logits.dtype))
            return gradients
        (gradients,) = torch.autograd.grad(logits, features, (FLOAT16_GRADIENT_SCALE * objective).to(logits.dtype))
        return gradients.float() / FLOAT16_GRADIENT_SCALE


class UnsupportedOutputError(Exception):
    """The network does not return one row of class scores for each image."""


def _logits(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


class EagerPasses:
    """Passes over up to ``max_rows`` rows whose inputs are filled in place, in buffers that are kept."""

    def __init__(self, network: Network, max_rows: int) -> None:
        self._network, self._max_rows = network, max_rows
        self._buffers: dict[tuple, Rows] = {}

    def buffers(self, features: Tensor, dtype: torch.dtype) -> Rows:
        """Room for ``max_rows`` rows of features as in ``features`` [1, ...]."""
        key = (features.shape, features.stride(), features.device, dtype)
        if key not in self._buffers:
            self._drop()
            self._buffers[key] = Rows.like(features, dtype, self._max_rows)
        return self._buffers[key]

    def gradients(self, rows: Rows, count: int) -> Tensor:
        """``Network.row_gradients`` of the first rows of a buffer, valid until the next call."""
        return self._network.row_gradients(rows[:count])

    def _drop(self) -> None:
        """One buffer at a time: images of another shape replace it."""
        self._buffers.clear()


class CapturedPasses(EagerPasses):
    """The same as CUDA graphs: one for each of a few row counts, replayed without launch costs.

    A chunk is padded to the next count with rows whose signs are zero. The graphs read the same buffers and share their
    memory.
    """

    def __init__(self, network: Network, max_rows: int) -> None:
        super().__init__(network, max_rows)
        eighths = {max(1, max_rows * part // 8) for part in range(1, 9)}
        self._counts = sorted(eighths | {count for count in USUAL_ROW_COUNTS if count < max_rows})
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = None

    def gradients(self, rows: Rows, count: int) -> Tensor:
        padded = next(each for each in self._counts if each >= count)
        if padded not in self._graphs:
            self._graphs[padded] = self._capture(rows[:padded])
        rows.signs[count:padded].zero_()
        graph, gradients = self._graphs[padded]
        graph.replay()
        return gradients[:count]

    def _capture(self, rows: Rows) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARMUPS):
                self._network.row_gradients(rows)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            gradients = self._network.row_gradients(rows)
        self._pool = graph.pool()
        return graph, gradients

    def _drop(self) -> None:
        super()._drop()
        self._graphs.clear()
        self._pool = None


def memory_format(tensor: Tensor) -> torch.memory_format:
    """How convolutions like features [n, channels, height, width] laid out; other tensors as they come."""
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
