"""A drop-in for ``captum.attr.IntegratedGradients`` with Captum's arguments, results and errors, run by the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import captum.attr
import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job
from captum.attr._utils.common import _format_input_baseline, _validate_input
from captum.log import log_usage
from classifier_network import Network, UnsupportedOutputError
from torch import Tensor


class IntegratedGradients(captum.attr.IntegratedGradients):
    """``captum.attr.IntegratedGradients``, faster where one tensor goes into a module that returns class scores.

    Args:
        forward_func: see Captum. Where a module has ``stem`` and ``tail``, the stem is hoisted.
        multiply_by_inputs: see Captum.
        max_rows: rows of one forward and backward pass; bounds memory.
    """

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True, max_rows: int = 8) -> None:
        network = Network(forward_func)
        # Captum's code needs a function that returns logits and nothing else; it finds hooks only on the module itself.
        returns_tuple = network.hoists or isinstance(network.module, torch.jit.ScriptModule)
        super().__init__(network if returns_tuple else network.module, multiply_by_inputs)
        self.engine = AttributionEngine(network, max_rows, multiply_by_inputs=multiply_by_inputs)

    @log_usage()  # NoiseTunnel calls what this decorator wraps
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Captum's ``attribute``.

        Captum's own code runs for several inputs, extra forward arguments, functions that are not modules, modules with
        hooks, and targets other than one class for each example. Arguments, results and errors are Captum's.
        """
        jobs = None
        if additional_forward_args is None:
            jobs = self._jobs(inputs, baselines, target, n_steps, method)
        explanations: list[Explanation] = []
        if jobs is not None:
            with contextlib.suppress(UnsupportedOutputError):
                answers = self.engine.explain(jobs, internal_batch_size, with_delta=return_convergence_delta)
                explanations = [answer for answer in answers if answer is not None]  # all: none can be cancelled
        if not explanations:
            return super().attribute(
                inputs,
                baselines,
                target,
                additional_forward_args,
                n_steps,
                method,
                internal_batch_size,
                return_convergence_delta,
            )
        stacked = torch.stack([explanation.attributions for explanation in explanations])
        attributions = (stacked,) if isinstance(inputs, tuple) else stacked
        if not return_convergence_delta:
            return attributions
        deltas = [e.convergence_delta for e in explanations if e.convergence_delta is not None]
        return attributions, torch.stack(deltas)

    def _jobs(self, inputs: Any, baselines: Any, target: Any, n_steps: int, method: str) -> list[Job] | None:
        """The jobs of a call with Captum's arguments; None if the engine does not accelerate it."""
        formatted, starts = _format_input_baseline(inputs, baselines)
        _validate_input(formatted, starts, n_steps, method)
        images, start = formatted[0], starts[0]
        if len(formatted) > 1 or not images.is_floating_point() or not _is_hookless_module(self.engine.network.module):
            return None
        if isinstance(target, int):
            targets = [target] * len(images)
        elif isinstance(target, Tensor) and target.dim() <= 1 and not target.is_floating_point():
            targets = target.reshape(-1).tolist()
        elif isinstance(target, list) and all(isinstance(class_index, int) for class_index in target):
            targets = list(target)
        else:
            return None
        if len(targets) == 1:
            targets *= len(images)
        if len(targets) != len(images) or not targets or min(targets) < 0:
            return None
        images = images.detach()
        if not isinstance(start, Tensor):
            start = torch.full_like(images[:1], start)
        start = start.detach().to(images).expand_as(images)
        return [
            Job(image, baseline, class_index, n_steps, method)
            for image, baseline, class_index in zip(images, start, targets)
        ]


def _is_hookless_module(function: Any) -> bool:
    """Whether the function is a module in which no hook would see Captum's passes."""
    if not isinstance(function, torch.nn.Module):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, name, None) for module in function.modules() for name in hooks)
