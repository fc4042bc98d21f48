"""Whether the rows of a module can be passed in any chunks: a probe of its values and gradients at first use."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch
from classifier_network import split_fault
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode

# The classes of the files that `tools.export` writes, now and in version 0.1.0, as TorchScript names them.
_EXPORTED = re.compile(r"__torch__\.tools\.(\w+\.)*(Plain|Hoistable|PiecewiseLinear|DiscreteGradient)Classifier")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# The other rows of a batch are so many times as large, or NaN, so that anything read from them shows.
OTHERS_SCALE = 1e3
# Largest difference of a row in a batch from the row alone, relative to its largest value: float32's rounding on a CPU,
# and TF32's, which depends on the number of rows, elsewhere.
CPU_TOLERANCE, OTHER_TOLERANCE = 1e-4, 1e-2
# The same for the norm of gradients: rounding may flip an activation near 0.
GRADIENT_TOLERANCE = 0.05
# PyTorch's marks of operators that read values into Python, or whose output's shape depends on them.
VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class RowsError(Exception):
    """The rows of a module cannot be passed in chunks, or it cannot be known; the message says why."""


class ModuleState:
    """What a module and its parts refer to, held and compared by identity: weights may change, but not be replaced."""

    def __init__(self, module: nn.Module, with_versions: bool = False) -> None:
        self._parts = [(part, _attributes(part, with_versions)) for part in module.modules()]

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleState) or len(self._parts) != len(other._parts):
            return False
        return all(
            part is other_part
            and attributes.keys() == others.keys()
            and all(map(_is_same, attributes.values(), others.values()))
            for (part, attributes), (other_part, others) in zip(self._parts, other._parts)
        )


def _attributes(part: nn.Module, with_versions: bool) -> dict[Any, Any]:
    # TorchScript looks its methods up once.
    attributes: dict[Any, Any] = {n: v for n, v in vars(part).items() if not isinstance(v, torch._C.ScriptMethod)}
    for holder in ("_parameters", "_buffers", "_modules"):
        for name, value in getattr(part, holder).items():
            attributes[holder, name] = value
            if with_versions and isinstance(value, Tensor):
                attributes[holder, name, "version"] = value._version
    if isinstance(part, torch.jit.ScriptModule) and hasattr(part, "_concrete_type"):
        for name in part._concrete_type.get_attributes():
            value = part._c.getattr(name)
            attributes["script", name] = value if isinstance(value, Tensor) else repr(value)  # a new object each time
    for name, value in list(attributes.items()):
        if isinstance(value, (list, dict, set, deque)):
            attributes[name, "length"] = len(value)
    return attributes


def _is_same(value: object, other: object) -> bool:
    return value is other or (type(value) is type(other) and isinstance(value, (int, float, str)) and value == other)


def is_exported(function: object) -> TypeGuard[torch.jit.ScriptModule]:
    """Whether a function is a file of ``tools.export``: (logits, probabilities), perhaps with an affine stem."""
    if not isinstance(function, torch.jit.ScriptModule) or not hasattr(function, "_c"):
        return False
    name = re.sub(r"___torch_mangle_\d+\.", "", function._c._type().qualified_name())
    return _EXPORTED.fullmatch(name) is not None


def why_not_plain(module: nn.Module, images: Tensor) -> str:
    """Why the engine does not take a module; empty if it may, after a probe."""
    if global_hooks._has_any_global_hook():
        return "there are hooks of all modules"
    for part in module.modules():
        if getattr(part, "training", False):
            return "it is not in evaluation mode"
        if any(getattr(part, name, None) for name in _HOOKS):
            return "it has hooks"
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(part, "_orig_mod"):
            return "it is a wrapper that compiles or distributes its batches"
    for weight in module.parameters():
        if weight.is_inference() or (weight.is_floating_point() and weight.dtype != images.dtype):
            return "its weights have another dtype than the images, or were made in inference mode"
    return ""


def count_classes(module: nn.Module, image: Tensor, is_exported_file: bool = False) -> int:
    """The number of classes of a module whose rows are independent of each other and of earlier calls.

    The module itself is not run, but a copy that shares its weights. Two rows near the image, each alone, must have the
    values and gradients that they have among rows that are far larger, and beside one of NaN.

    Args:
        module: in evaluation mode, images [n, ...] -> scores [n, classes].
        image: [1, ...], finite.
        is_exported_file: see ``is_exported``; its stem is checked too.

    Raises:
        RowsError: a row depends on others, on how many there are, on random numbers or on earlier calls; the module
            decides by values; it does not return scores; or it fails.
    """
    scale, generator = image.abs().max().clamp_min(1), torch.Generator().manual_seed(0)
    near, far = (scale * torch.randn(image.shape, generator=generator).to(image) for _ in range(2))
    far = OTHERS_SCALE * far
    # At the image itself, zeros or activations that are all off may hide a dependence.
    rows = torch.cat((image + near, image - 10 * near))
    # Nothing is above a threshold together with NaN, and little else hides it.
    batches = (rows[:1], rows[1:], torch.cat((far, rows, -far)), torch.cat((torch.full_like(image, torch.nan), rows)))
    reads = _ValueReads()
    try:
        probe = copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})
        before = ModuleState(probe, with_versions=True)
        with _random_numbers_kept(image.device), reads, torch.jit.optimized_execution(False):
            passes = [_pass(probe, batch, is_exported_file) for batch in batches]
        fault = split_fault(probe, torch.cat((image, far))) if is_exported_file and hasattr(probe, "stem") else ""
        is_unchanged = before == ModuleState(probe, with_versions=True)
    except RowsError:
        raise
    except Exception as error:  # a module may raise anything
        raise RowsError(f"it fails on one row or on some: {error!r:.200}") from None
    if reads.operator:
        raise RowsError(f"its operators depend on values ({reads.operator})")
    if not is_unchanged:
        raise RowsError("it changes with each call")
    if fault:
        raise RowsError(fault)
    _compare(passes[:2], passes[2:], CPU_TOLERANCE if image.device.type == "cpu" else OTHER_TOLERANCE)
    return passes[0][0].shape[1]


def _compare(alone: list[tuple[Tensor, Tensor]], together: list[tuple[Tensor, Tensor]], tolerance: float) -> None:
    """Compare the values and gradients of rows alone with theirs in batches, where they begin at the second row."""
    if len({values.shape[1] for values, _ in (*alone, *together)}) > 1:
        raise RowsError("it returns another number of classes for another number of rows")
    if not any(gradients.any() for _, gradients in alone):
        raise RowsError("it has no gradients near the image, so that nothing can be compared")
    for row, (values, gradients) in enumerate(alone):
        for batch_values, batch_gradients in together:
            if not _near(batch_values[1 + row], values[0], torch.inf, tolerance):
                raise RowsError("a row's values depend on other rows")
            if not _near(batch_gradients[1 + row], gradients[0], 2, GRADIENT_TOLERANCE):
                raise RowsError("a row's gradients depend on other rows")


def _pass(module: nn.Module, rows: Tensor, is_exported_file: bool) -> tuple[Tensor, Tensor]:
    """Scores [n, classes] of rows and the gradients of their weighted sum."""
    with torch.enable_grad():
        rows = rows.detach().clone().requires_grad_()
        scores = module(rows)[0] if is_exported_file else module(rows)
        if type(scores) is not Tensor or scores.dim() != 2 or len(scores) != len(rows) or scores.dtype != rows.dtype:
            raise RowsError("it does not return scores [rows, classes] in the dtype of the rows")
        factors = torch.linspace(0.5, 1.5, scores.shape[1]).to(scores)
        (gradients,) = torch.autograd.grad((scores * factors).sum(), rows)
    return scores.detach(), gradients


def _near(values: Tensor, reference: Tensor, norm: float, tolerance: float) -> bool:
    difference, size = (torch.linalg.vector_norm(each, norm) for each in (values - reference, reference))
    return bool(difference <= tolerance * size)


class _ValueReads(TorchDispatchMode):
    """Notes operators that read values into Python, or whose output's shape depends on them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operator = ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not VALUE_TAGS.isdisjoint(function.tags) and not _is_index_by_places(function, args):
            self.operator = str(function)
        return function(*args, **(kwargs or {}))


def _is_index_by_places(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator indexes by integers, unlike masks, which count what they select."""
    if function != torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1])


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Restore the random number generators.

    Raises:
        RowsError: they were used.
    """
    devices = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    before = _generators(devices)
    try:
        with torch.random.fork_rng(devices):
            yield
            is_used = _generators(devices) != before
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    if is_used:
        raise RowsError("it uses random numbers")


def _generators(devices: list[torch.device]) -> tuple[Any, ...]:
    """The states of the generators of Python, NumPy and PyTorch."""
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    return pickle.dumps((random.getstate(), np.random.get_state())), *(state.numpy().tobytes() for state in states)
