"""The module that Triton serves and the engine differentiates, built from an eager classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from error_reasons import reason
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from tools.torchscript.discrete_gradients import add_discrete_gradients, dependents, is_affine, is_batch_first
from tools.torchscript.exported_graph import TracingError, finish, trace

aten = torch.ops.aten

# Largest difference from the eager model, relative to its largest logit; float32 rounding is about 1e-6.
TOLERANCE = 1e-4
# Relative L2 distance of gradients: an activation that is 0 but for rounding may pass its gradient in one of the two.
GRADIENT_TOLERANCE = 0.05
# A pattern of TorchScript's graphs, by the operator's name.
_PATTERN = "graph(%tensor, %shape):\n  %result = aten::{}(%tensor, %shape)\n  return (%result)"


class ScriptingError(Exception):
    """A classifier cannot be written as TorchScript, or the file differs from it; the message says where."""


class ServedClassifier(nn.Module):
    """A classifier that returns (logits, probabilities).

    Attributes:
        limitation: why its gradients cannot be discrete gradients; empty if they can.
    """

    def __init__(self, limitation: str) -> None:
        super().__init__()
        self.limitation = limitation


class PlainClassifier(ServedClassifier):
    """A network that is used as it is."""

    def __init__(self, network: nn.Module, limitation: str) -> None:
        super().__init__(limitation)
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float32 [n, channels, height, width] -> (logits, probabilities), each [n, classes]."""
        logits = self.network(pixels)
        return logits, logits.softmax(dim=1)


class HoistableClassifier(ServedClassifier):
    """``tail(stem(pixels)) = logits``, with an affine stem."""

    def __init__(self, stem: nn.Module, tail: nn.Module, limitation: str) -> None:
        super().__init__(limitation)
        self.stem_layers = stem
        self.tail_layers = tail

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float32 [n, channels, height, width] -> (logits, probabilities), each [n, classes]."""
        logits = self.tail(self.stem(pixels))
        return logits, logits.softmax(dim=1)

    @torch.jit.export
    def stem(self, pixels: Tensor) -> Tensor:
        """The affine beginning of the network."""
        return self.stem_layers(pixels)

    @torch.jit.export
    def tail(self, features: Tensor) -> Tensor:
        """The rest of the network: the stem's features -> logits [n, classes]."""
        return self.tail_layers(features)


class DiscreteGradientClassifier(HoistableClassifier):
    """The same, for a network whose gradients can be discrete gradients over segments of a path."""

    @torch.jit.export
    def mean_slope_tail(self, features: Tensor, paired: Tensor) -> Tensor:
        """``tail`` for points of a path; where ``paired`` [n], gradients are means over the segment to the next row."""
        return self.tail_layers(features, paired)


def build_served(module: nn.Module, input_shape: Sequence[int], with_discrete: bool = True) -> ServedClassifier:
    """The module to script for a classifier of images [n, *input_shape]: without batch normalisation, and split.

    It is split behind the affine operators that it begins with. A TorchScript module, or one that `torch.export` cannot
    read, is served as it is.

    Args:
        module: in evaluation mode, pixels -> logits [n, classes].
        input_shape: [channels, height, width].
        with_discrete: give it discrete gradients where all of its operators have some.
    """
    served = _build(module, input_shape, with_discrete)
    served.training = False  # eval() would call those of parts from `torch.export`, which refuse it
    return served.requires_grad_(False)


def _build(module: nn.Module, input_shape: Sequence[int], with_discrete: bool) -> ServedClassifier:
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return PlainClassifier(module, "it was a TorchScript file")
    try:
        network = trace(module, input_shape)
    except TracingError as error:
        return PlainClassifier(module, f"torch.export cannot read it: {error}")
    _pool_before_relu(network)
    stem, tail = _split_behind_stem(network)
    unknown = add_discrete_gradients(tail) if with_discrete else ""
    if with_discrete and not unknown:
        return DiscreteGradientClassifier(stem, _scriptable(tail), "")
    limitation = f"no discrete gradient of {unknown} is known" if unknown else "discrete gradients were not wanted"
    return HoistableClassifier(stem, _scriptable(tail), limitation)


def _scriptable(network: GraphModule) -> GraphModule:
    """Call the operators by names that TorchScript knows: without overloads. Changes ``network``."""
    for node in network.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    network.recompile()
    return network


def _pool_before_relu(network: GraphModule) -> None:
    """Swap each ReLU with the max pooling behind it if nothing else reads the ReLU. Changes ``network``.

    Values and gradients stay the same, because ReLU is monotone; it then has fewer values to compute.
    """
    for pool in list(network.graph.nodes):
        if pool.target != aten.max_pool2d.default:
            continue
        relu = pool.args[0]
        if relu.target != aten.relu.default or len(relu.users) > 1:
            continue
        pool.args = (relu.args[0], *pool.args[1:])
        pool.replace_all_uses_with(relu)
        relu.args = (pool,)
        relu.meta, pool.meta = pool.meta, {**pool.meta}
        pool.append(relu)
    finish(network)


def _split_behind_stem(network: GraphModule) -> tuple[nn.Module, GraphModule]:
    """(stem, tail) of a network; the stem is an identity if the first operator is not affine."""
    pixels = next(node for node in network.graph.nodes if node.op == "placeholder")
    changing = dependents(pixels)
    end = last = pixels
    while True:
        users = [user for user in last.users if user in changing or user.op == "output"]
        if len(users) != 1 or not is_affine(users[0], changing):
            break
        (last,) = users
        if is_batch_first(last, pixels):
            end = last
    if end is pixels:
        return nn.Identity(), network
    output = next(node for node in network.graph.nodes if node.op == "output")
    return _scriptable(_extract(network, pixels, end, "pixels")), _extract(network, end, output.args[0], "features")


def _extract(network: GraphModule, start: Node, end: Node, name: str) -> GraphModule:
    """The part of a network that computes ``end`` from ``start``, which becomes its input ``name``."""
    pixels = next(node for node in network.graph.nodes if node.op == "placeholder")
    graph = Graph()
    inputs = graph.placeholder(name)
    inputs.meta = dict(start.meta)
    # Behind the stem the network reads the number of images from the features.
    copies = {pixels: inputs, start: inputs}
    for node in network.graph.nodes:
        if node not in copies and node.op != "output" and all(n in copies for n in node.all_input_nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    part = GraphModule(network, graph)
    finish(part)
    return part


def script(module: nn.Module, input_shape: Sequence[int], file: Path) -> tuple[ServedClassifier, float]:
    """Write a classifier as TorchScript, in the fastest form that ``verify`` finds right.

    Args:
        module, input_shape: see ``build_served``.
        file: to write.

    Returns:
        What was written, and its difference from the classifier.

    Raises:
        ScriptingError: TorchScript cannot compile it, or the file differs from it.
    """
    forms: tuple[Callable[[], ServedClassifier], ...] = (
        lambda: build_served(module, input_shape),
        lambda: build_served(module, input_shape, with_discrete=False),
        lambda: PlainClassifier(module, ""),
    )
    failures: list[ScriptingError] = []
    for form in forms:
        served = form()
        if failures:
            served.limitation = f"the faster form failed, {failures[0]}"
        try:
            return served, _write(served, module, input_shape, file)
        except ScriptingError as error:
            failures.append(error)
        if isinstance(served, PlainClassifier):
            break
    raise failures[0]


def _write(served: ServedClassifier, eager: nn.Module, input_shape: Sequence[int], file: Path) -> float:
    try:
        scripted = torch.jit.script(served)
        _reshape_where_it_views(scripted)
        scripted.save(str(file))
    except Exception as error:  # the compiler raises whatever it stumbles over
        raise ScriptingError(f"TorchScript cannot compile the network: {reason(error)}") from None
    try:
        return verify(torch.jit.load(str(file)), eager, input_shape)
    except RuntimeError as error:
        raise ScriptingError(f"the network or its export cannot be run: {reason(error)}") from None


def _reshape_where_it_views(scripted: torch.jit.ScriptModule) -> None:
    """Read tensors of any memory format, as channels_last's, where the code is TorchScript's own. Changes it."""
    for part in scripted.modules():
        functions: Any = getattr(part, "_c", None)
        for name in functions._method_names() if functions is not None else ():
            graph = functions._get_method(name).graph
            rewrite = torch._C._jit_pass_custom_pattern_based_rewrite_graph
            rewrite(_PATTERN.format("view"), _PATTERN.format("reshape"), graph)


def verify(served: torch.jit.ScriptModule, eager: nn.Module, input_shape: Sequence[int]) -> float:
    """Compare a scripted classifier with the eager one, as the engine runs it: in channels_last, with gradients.

    Args:
        served: the scripted one; its weights become channels_last.
        eager: the one that it was made of.
        input_shape: [channels, height, width]; three random images are used, and the first of them alone.

    Returns:
        The largest difference of the logits, relative to the largest logit.

    Raises:
        ScriptingError: they differ, or ``stem`` is not affine.
    """
    served = nn.Module.to(served, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    pixels, others = torch.randn(2, 3, *input_shape, generator=generator)
    with torch.no_grad():
        checks = {"logits of one image": (_difference(served(pixels[:1])[0], eager(pixels[:1])), TOLERANCE)}
        checks |= _compare_values(served, eager(pixels), pixels, others)
    checks |= _compare_gradients(served, eager, pixels, others)
    for name, (value, allowed) in checks.items():
        if not value <= allowed:
            raise ScriptingError(f"the exported {name} differ from the eager model by {value:.1e}")
    return checks["logits"][0]


def _compare_values(
    served: torch.jit.ScriptModule, expected: Tensor, pixels: Tensor, others: Tensor
) -> dict[str, tuple[float, float]]:
    """Differences of values, and what is allowed."""
    logits, probabilities = served(pixels)
    checks = {"logits": (logits, expected), "probabilities": (probabilities, expected.softmax(dim=1))}
    if hasattr(served, "stem"):
        between = served.stem(0.3 * pixels + 0.7 * others)
        checks["stem (not affine)"] = (0.3 * served.stem(pixels) + 0.7 * served.stem(others), between)
        checks["tail(stem(pixels))"] = (served.tail(served.stem(pixels)), expected)
    return {name: (_difference(*values), TOLERANCE) for name, values in checks.items()}


def _compare_gradients(
    served: torch.jit.ScriptModule, eager: nn.Module, pixels: Tensor, others: Tensor
) -> dict[str, tuple[float, float]]:
    """Differences of gradients, and what is allowed."""
    with torch.enable_grad(), torch.jit.optimized_execution(False):
        pixels = pixels.clone().requires_grad_()
        expected, gradients = (
            torch.autograd.grad(logits[:, 0].sum(), pixels)[0] for logits in (eager(pixels), served(pixels)[0])
        )
        off = (gradients - expected).norm() / expected.norm().clamp_min(1e-30)
        checks = {"gradients": (off.item(), GRADIENT_TOLERANCE)}
        if hasattr(served, "mean_slope_tail"):
            # The discrete gradient times the step must be the whole change of the output.
            ends = torch.stack((0.6 * pixels[0] + 0.4 * others[0], pixels[0])).detach()
            features = served.stem(ends).detach().requires_grad_()
            logits = served.mean_slope_tail(features, torch.tensor([True, False]))
            (gradients,) = torch.autograd.grad(logits[0].sum(), features)
            change = (gradients[0] * (features[1] - features[0])).sum()
            off = (change - (logits[1] - logits[0]).sum()).abs() / logits.abs().sum()
            checks["mean_slope_tail"] = (_difference(logits, served.tail(features)), TOLERANCE)
            checks["discrete gradients"] = (off.item(), TOLERANCE)
    return checks


def _difference(values: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((values - reference).abs().max() / reference.abs().max().clamp_min(1e-6)).item()
