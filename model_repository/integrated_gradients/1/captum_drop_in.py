"""A drop-in for ``captum.attr.IntegratedGradients``. The engine takes its gradients where it is sure of the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import captum.attr
import torch
from accelerated_calls import is_plain_context, plain_images, rows_targets
from attribution_engine import AttributionEngine
from attribution_job import Job
from captum._utils.gradient import compute_gradients
from classifier_network import Network
from path_quadrature import quadrature
from row_independence import ModuleState, RowsError, count_classes, is_exported, why_not_plain
from torch import Tensor

logger = logging.getLogger(__name__)


class ExportedLogits(torch.nn.Module):
    """The logits of an exported classifier, which returns (logits, probabilities)."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Tensor:
        """Images [n, ...] -> logits [n, classes]."""
        logits: Tensor = self.module(*inputs)[0]
        return logits


class IntegratedGradients(captum.attr.IntegratedGradients):
    """``captum.attr.IntegratedGradients`` with its arguments, results and errors, faster where one tensor is explained.

    The engine takes the gradients if the function is a module in evaluation mode, without hooks, in float32 or float64,
    whose rows are independent of each other: a probe of nine rows checks it at the first call, and again for other
    shapes and sizes of values and after changes to the module. Each image needs one class as its target. The stem of a
    file that ``tools.export`` wrote is hoisted, and its logits are explained. Everything else is run by Captum's code.

    Args:
        forward_func: see Captum.
        multiply_by_inputs: see Captum.
        max_rows: rows of one forward and backward pass of the engine, at least 1; bounds memory.
    """

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True, max_rows: int = 8) -> None:
        super().__init__(forward_func, multiply_by_inputs)
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {max_rows}")
        self.max_rows = max_rows
        self._probed: _Probed | None = None

    @property
    def forward_func(self) -> Callable[..., Any]:
        """The function that is explained; for a file that ``tools.export`` wrote, its logits."""
        return self._forward_func

    @forward_func.setter
    def forward_func(self, function: Callable[..., Any]) -> None:
        self._forward_func = ExportedLogits(function) if is_exported(function) else function

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied; the probe is repeated."""
        return {**vars(self), "_probed": None}

    def _attribute(
        self,
        inputs: tuple[Tensor, ...],
        baselines: tuple[Tensor | int | float, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        step_sizes_and_alphas: tuple[list[float], list[float]] | None = None,
    ) -> tuple[Tensor, ...]:
        """The attributions of Captum's ``attribute``, which checks the arguments, batches and adds the delta."""
        gradients = None
        if len(inputs) == 1 and additional_forward_args is None and self.gradient_func is compute_gradients:
            gradients = self._mean_gradients(inputs[0], baselines[0], target, n_steps, method, step_sizes_and_alphas)
        if gradients is None:
            attributions: tuple[Tensor, ...] = super()._attribute(
                inputs, baselines, target, additional_forward_args, n_steps, method, step_sizes_and_alphas
            )
            return attributions
        return (gradients * (inputs[0] - baselines[0]) if self.multiplies_by_inputs else gradients,)

    def _mean_gradients(
        self,
        images: Tensor,
        start: Tensor | float,
        target: Any,
        n_steps: int,
        method: str,
        step_sizes_and_alphas: tuple[list[float], list[float]] | None,
    ) -> Tensor | None:
        """Weighted sums of gradients along the paths, shaped like ``images``; None if Captum's code has to run."""
        function = self.forward_func
        is_exported_file = isinstance(function, ExportedLogits)
        module = function.module if isinstance(function, ExportedLogits) else function
        if type(n_steps) is not int or n_steps < 2 - bool(step_sizes_and_alphas):
            return None
        ends = plain_images(images, start) if is_plain_context(images) else None
        if ends is None or not isinstance(module, torch.nn.Module) or why_not_plain(module, images):
            return None
        classes = self._count_classes(module, *ends, is_exported_file)
        targets = rows_targets(target, len(images), classes, images.device)
        if targets is None:
            return None
        if step_sizes_and_alphas is None:
            rule = quadrature(method, n_steps)
        else:
            step_sizes, alphas = step_sizes_and_alphas
            rule = (
                torch.tensor(alphas, dtype=torch.float64, device="cpu"),
                torch.tensor(step_sizes, device="cpu").float(),
            )
        jobs = [Job(*ends_and_target, n_steps, method, rule=rule) for ends_and_target in zip(*ends, targets)]
        # An engine of its own for each call: none waits for another, and it reads the weights as they are now.
        network = Network(module, hoist=is_exported_file)
        try:
            explanations = AttributionEngine(network, self.max_rows, multiply_by_inputs=False).explain(
                jobs, with_delta=False
            )
        except Exception as error:  # of the module's own; Captum's code raises it again
            logger.info("the engine stopped with %r", error)
            return None
        return torch.stack([each.attributions for each in explanations if each is not None])

    def _count_classes(self, module: torch.nn.Module, images: Tensor, start: Tensor, is_exported_file: bool) -> int:
        """Classes of a module whose rows are independent; 0 for any other."""
        probed = self._probed
        if probed is None or probed.state != ModuleState(module):
            probed = self._probed = _Probed(module)
        size = torch.maximum(images.abs().max(), start.abs().max())
        key = (images.shape[1:], images.dtype, images.device, int(size.clamp_min(1).log10()))
        if key not in probed.classes:
            try:
                probed.classes[key] = count_classes(module, images[:1], is_exported_file)
            except RowsError as error:
                logger.info("Captum's code explains this module, because %s", error)
                probed.classes[key] = 0
        return probed.classes[key]


class _Probed:
    """The probes of a module, valid until its state changes."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.state = ModuleState(module)
        self.classes: dict[tuple[torch.Size, torch.dtype, torch.device, int], int] = {}
