"""The classifier as the engine sees it, and the forward and backward pass of one chunk of rows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from path_quadrature import quadrature
from torch import Tensor

logger = logging.getLogger(__name__)

# float16 underflows below 6e-8, and gradients with respect to early features get that small.
FLOAT16_GRADIENT_SCALE = 64.0
# Nodes and weights on [0, 1] for means of the softmax's gradient. The error of a probability's change is 3e-7 where a
# logit changes by 10 from one row to the next, and 2e-3 where it changes by 20.
SOFTMAX_QUADRATURE = tuple(values.tolist() for values in quadrature("gausslegendre", 16))
# Largest difference between values that a split makes, relative to the largest value: TF32 rounds by 1e-3.
SPLIT_TOLERANCE = 1e-2
# Passes on a side stream before a capture, as PyTorch's notes on CUDA graphs require.
CAPTURE_WARMUPS = 3
# Captured besides eighths of the largest: the default number of steps.
USUAL_ROW_COUNTS = (50,)


@dataclass(frozen=True)
class Rows:
    """The inputs of a pass.

    ``features`` [rows, ...]; ``classes`` int64 [rows, 2], the two classes whose combination each row explains;
    ``signs`` [rows, 2], their factors in it; ``on_probability`` bool [rows, 1], whether probabilities are combined
    instead of logits; ``paired`` bool [rows], whether the row and the next one are consecutive points of a path and its
    gradient is the mean over the segment between them.
    """

    features: Tensor
    classes: Tensor
    signs: Tensor
    on_probability: Tensor
    paired: Tensor

    @classmethod
    def like(cls, features: Tensor, dtype: torch.dtype, count: int) -> Rows:
        """Zeros for ``count`` rows of features like ``features`` [1, ...]."""
        device = features.device
        zeros = torch.zeros((count, *features.shape[1:]), dtype=dtype, device=device)
        if features.is_contiguous(memory_format=memory_format(features)):
            zeros = zeros.contiguous(memory_format=memory_format(features))
        return cls(
            zeros,
            torch.zeros(count, 2, dtype=torch.int64, device=device),
            torch.zeros(count, 2, dtype=dtype, device=device),
            torch.zeros(count, 1, dtype=torch.bool, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
        )

    def with_other_objectives(self) -> Rows:
        """The same features, with objectives of their own to be written."""
        others = (torch.zeros_like(each) for each in (self.classes, self.signs, self.on_probability))
        return replace(self, **dict(zip(("classes", "signs", "on_probability"), others)))

    def __getitem__(self, rows: slice) -> Rows:
        """Views of a slice of the rows."""
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))


class Network:
    """A classifier as ``tail(stem(images)) = logits``, with ``stem`` affine or absent.

    Args:
        module: returns logits [n, classes], or a tuple that begins with them, and may have the methods ``stem`` and
            ``tail``, the submodule ``stem_layers`` that ``stem`` calls, and the method ``mean_slope_tail``, as
            `tools/export` writes them into TorchScript files.
        precision: dtype of the tail's passes over rows; None: the module's. With ``torch.float16`` (CUDA only) the stem
            and the sums stay float32.
        float64_stem: evaluate the stem in float64 where the module has ``stem_layers``.
        hoist: use ``stem`` and ``tail`` where the module has them; ``split_fault`` says whether they are what they must
            be.
    """

    def __init__(
        self, module: Any, precision: torch.dtype | None = None, float64_stem: bool = True, hoist: bool = True
    ) -> None:
        self.module = module
        self.precision = precision
        self.convolutions: AbstractContextManager[Any] = nullcontext()  # entered for the passes over rows
        self.hoists = hoist and hasattr(module, "stem") and hasattr(module, "tail")
        self.has_mean_slopes = self.hoists and hasattr(module, "mean_slope_tail")
        self._row_module = module if precision is None else copy.deepcopy(module).to(precision)
        # A hoisted stem is evaluated so rarely that float64 costs nothing there. Most of a network's activations come
        # right after it, and most of float32's error comes from rounding that flips one of them.
        stem_layers = getattr(module, "stem_layers", None) if self.hoists and float64_stem else None
        self._float64_stem = None if stem_layers is None else copy.deepcopy(stem_layers).double()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, ...]."""
        return _logits(self.module(images))

    def stem(self, images: Tensor) -> Tensor:
        """Features of images [n, ...], float64 with ``float64_stem``; the images themselves where there is no stem."""
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

    def row_gradients(self, rows: Rows, any_paired: bool = False) -> Tensor:
        """Gradients of each row's objective with respect to its features, shaped like ``rows.features``.

        Args:
            rows: inputs of the pass.
            any_paired: whether any row is paired, which requires ``has_mean_slopes``.

        Raises:
            UnsupportedOutputError: the network does not return [rows, classes].
        """
        (gradients,) = self.shared_gradients([rows], any_paired)
        return gradients

    def shared_gradients(self, objectives: Sequence[Rows], any_paired: bool = False) -> Iterator[Tensor]:
        """The same for several objectives of each row: one forward pass, and a backward pass for each objective.

        Args:
            objectives: rows that differ in their objectives alone.
            any_paired: see ``row_gradients``.

        Yields:
            For each of ``objectives`` its gradients. The next backward pass runs when they are asked for, so that only
            one's are held.
        """
        rows = objectives[0]
        features = rows.features.detach().to(self.precision or rows.features.dtype).requires_grad_()
        # TorchScript's optimiser would differentiate parts of the network by itself, with more passes over memory.
        with self.convolutions, torch.enable_grad(), torch.jit.optimized_execution(False):
            if any_paired:
                logits = self._row_module.mean_slope_tail(features, rows.paired)
            else:
                logits = _logits(self._row_module.tail(features) if self.hoists else self._row_module(features))
        if logits.dim() != 2:
            raise UnsupportedOutputError
        for each in objectives:
            objective = self._output_gradient(each, logits.detach(), any_paired)
            scales = self.precision == torch.float16
            direction = (FLOAT16_GRADIENT_SCALE * objective if scales else objective).to(logits.dtype)
            is_last = each is objectives[-1]
            with self.convolutions:
                (gradients,) = torch.autograd.grad(logits, features, direction, retain_graph=not is_last)
            yield gradients.float() / FLOAT16_GRADIENT_SCALE if scales else gradients

    def _output_gradient(self, rows: Rows, logits: Tensor, any_paired: bool) -> Tensor:
        """Gradients of each row's objective with respect to its logits, both [rows, classes]."""
        scores = logits.to(rows.signs.dtype)
        direction = torch.zeros_like(scores).scatter_add_(1, rows.classes, rows.signs)
        through_softmax = _softmax_gradient(scores, direction)
        if any_paired:
            mean = _mean_softmax_gradient(scores, direction)
            through_softmax = torch.where(rows.paired[:, None], mean, through_softmax)
        return torch.where(rows.on_probability, through_softmax, direction)


def _softmax_gradient(logits: Tensor, direction: Tensor) -> Tensor:
    """Gradients of ``softmax(logits) . direction`` with respect to logits, all [rows, classes]."""
    probabilities = logits.softmax(dim=1)
    return probabilities * (direction - (probabilities * direction).sum(dim=1, keepdim=True))


def _mean_softmax_gradient(logits: Tensor, direction: Tensor) -> Tensor:
    """The same, as means over the segment from a row's logits to the next row's; the last row has no segment."""
    segments = torch.cat((logits[1:], logits[-1:])) - logits
    total = torch.zeros_like(logits)
    for node, weight in zip(*SOFTMAX_QUADRATURE):
        total += weight * _softmax_gradient(logits + node * segments, direction)
    return total


class UnsupportedOutputError(Exception):
    """The network does not return one row of class scores for each image."""


@torch.no_grad()
def split_fault(module: Any, images: Tensor) -> str:
    """Why a module's stem cannot be hoisted; empty if it can.

    Args:
        module: with ``stem`` and ``tail``.
        images: two different ones, [2, ...].
    """
    features, between = module.stem(images), module.stem(images.lerp(images.flip(0), 0.3))
    if not _is_near(between, features.lerp(features.flip(0), 0.3)):
        return "its stem is not affine"
    return "" if _is_near(module.tail(features), _logits(module(images))) else "it does not return tail(stem(images))"


def _is_near(values: Tensor, reference: Tensor) -> bool:
    return bool((values - reference).abs().max() <= SPLIT_TOLERANCE * reference.abs().max())


def _logits(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


class EagerPasses:
    """Passes over up to ``max_rows`` rows. Their inputs are written in place, into buffers that are kept."""

    shares = True  # a forward pass may have several backward passes

    def __init__(self, network: Network, max_rows: int) -> None:
        self._network, self._max_rows = network, max_rows
        self._buffers: dict[tuple[Any, ...], Rows] = {}

    def buffers(self, features: Tensor, dtype: torch.dtype) -> Rows:
        """Buffers for ``max_rows`` rows of features like ``features`` [1, ...]."""
        key = (features.shape, features.stride(), features.device, dtype)
        if key not in self._buffers:
            self._drop()
            self._buffers[key] = Rows.like(features, dtype, self._max_rows)
        return self._buffers[key]

    def gradients(self, rows: Rows, count: int, any_paired: bool = False) -> Tensor:
        """``Network.row_gradients`` of the first ``count`` rows of a buffer, valid until the next call."""
        return self._network.row_gradients(rows[:count], any_paired)

    def shared_gradients(self, objectives: Sequence[Rows], count: int, any_paired: bool = False) -> Iterator[Tensor]:
        """``Network.shared_gradients`` of the first ``count`` rows of a buffer."""
        return self._network.shared_gradients([rows[:count] for rows in objectives], any_paired)

    def _drop(self) -> None:
        """Drop the buffers; only one shape's are kept at a time."""
        self._buffers.clear()


class CapturedPasses(EagerPasses):
    """The same passes as CUDA graphs, one for each of a few row counts, replayed without launch costs.

    A chunk is padded to the next count with rows whose signs are zero. The graphs read the same buffers and share their
    memory. A graph has one backward pass.
    """

    shares = False

    def __init__(self, network: Network, max_rows: int) -> None:
        super().__init__(network, max_rows)
        eighths = {max(1, max_rows * part // 8) for part in range(1, 9)}
        self._counts = sorted(eighths | {count for count in USUAL_ROW_COUNTS if count < max_rows})
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # memory that the graphs share
        self._captures = True

    def gradients(self, rows: Rows, count: int, any_paired: bool = False) -> Tensor:
        padded = next(captured for captured in self._counts if captured >= count)
        if self._captures and (padded, any_paired) not in self._graphs:
            try:
                self._graphs[padded, any_paired] = self._capture(rows[:padded], any_paired)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # if the device is broken, the pass below fails too
                self._captures = False
                logger.warning("no CUDA graphs, passes are launched one by one from now on: %s", error)
        if (padded, any_paired) not in self._graphs:
            return super().gradients(rows, count, any_paired)
        rows.signs[count:padded].zero_()
        rows.paired[count:padded].zero_()
        graph, gradients = self._graphs[padded, any_paired]
        graph.replay()
        return gradients[:count]

    def _capture(self, rows: Rows, any_paired: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARMUPS):
                self._network.row_gradients(rows, any_paired)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may place their tensors on the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            gradients = self._network.row_gradients(rows, any_paired)
        self._pool = graph.pool()
        return graph, gradients

    def _drop(self) -> None:
        super()._drop()
        self._graphs.clear()
        self._pool = None


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The fastest layout: channels_last for features [n, channels, height, width], contiguous for other tensors."""
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
