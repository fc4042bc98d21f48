"""The module that Triton serves and the engine differentiates, built from an eager classifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from tools.torchscript import mean_slopes

# Layers that are affine functions of their input, whatever their weights.
AFFINE_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.Linear, nn.Identity, nn.ZeroPad2d)
# Largest difference from the eager model, relative to its largest logit; float32 rounding is about 1e-6.
TOLERANCE = 1e-4


class VerificationError(Exception):
    """The exported module differs from the eager one; the message says where."""


class HoistableClassifier(nn.Module):
    """``tail(stem(pixels)) = logits``, with an affine stem."""

    def __init__(self, stem: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.stem_layers = stem
        self.tail_layers = tail

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float32 [n, 3, 224, 224] -> (logits, probabilities), each [n, classes]."""
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


class PiecewiseLinearClassifier(HoistableClassifier):
    """The same, for a network whose gradients can be means over segments of a path (`tools/torchscript`)."""

    @torch.jit.export
    def mean_slope_tail(self, features: Tensor, paired: Tensor) -> Tensor:
        """``tail`` for points of a path; where ``paired`` [n], gradients are means over the segment to the next row."""
        return self.tail_layers(features, paired)


class PlainClassifier(nn.Module):
    """A network that does not begin with layers known to be affine."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float32 [n, 3, 224, 224] -> (logits, probabilities), each [n, classes]."""
        logits = self.network(pixels)
        return logits, logits.softmax(dim=1)


def build_served(module: nn.Module) -> nn.Module:
    """The module to script: batch norm folded, and split behind its affine layers if it begins with some."""
    folded = fuse(module)
    assert isinstance(folded, torch.fx.GraphModule)
    layers: Iterable[Any] = folded.modules()
    for layer in layers:
        if hasattr(layer, "inplace"):
            layer.inplace = False  # autograd forbids writing into the tail's input, a leaf
    for node in folded.graph.nodes:
        node.type = None  # TorchScript cannot read annotations that are strings
    _pool_before_relu(folded)
    split = _split_behind_stem(folded)
    served: nn.Module
    if split is None:
        served = PlainClassifier(folded)
    elif mean_slopes.add_mean_slopes(split[1]):
        served = PiecewiseLinearClassifier(*split)
    else:
        served = HoistableClassifier(*split)
    return served.eval().requires_grad_(False)


def _pool_before_relu(network: torch.fx.GraphModule) -> None:
    """Swap each ReLU with the max pooling behind it if nothing else reads the ReLU. Changes ``network``.

    Values and gradients stay the same, because ReLU is monotone; it then has fewer values to compute.
    """
    for pool in list(network.graph.nodes):
        if not _calls(network, pool, nn.MaxPool2d):
            continue
        relu = pool.args[0]
        if not _calls(network, relu, nn.ReLU) or len(relu.users) > 1:
            continue
        pool.args = relu.args
        pool.replace_all_uses_with(relu)
        relu.args = (pool,)
        pool.append(relu)
    network.graph.lint()
    network.recompile()


def _calls(network: torch.fx.GraphModule, node: torch.fx.Node, layers: type | tuple[type, ...]) -> bool:
    return node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), layers)


def _split_behind_stem(network: torch.fx.GraphModule) -> tuple[nn.Module, torch.fx.GraphModule] | None:
    """(stem, tail) of a traced network, or None if its first layer is not affine. Changes ``network``."""
    graph = network.graph
    last = pixels = next(node for node in graph.nodes if node.op == "placeholder")
    stem = []
    while len(last.users) == 1:
        (user,) = last.users
        if not _calls(network, user, AFFINE_LAYERS):
            break
        stem.append(network.get_submodule(user.target))
        last = user
    if not stem:
        return None
    with graph.inserting_before(pixels):
        features = graph.placeholder("features")
    last.replace_all_uses_with(features)
    while last is not pixels:
        last, done = last.args[0], last
        graph.erase_node(done)
    graph.erase_node(pixels)
    network.delete_all_unused_submodules()
    network.recompile()
    return nn.Sequential(*stem), network


@torch.no_grad()
def verify(served: torch.jit.ScriptModule, eager: nn.Module) -> float:
    """Compare a scripted classifier with the eager model; returns the largest difference relative to the largest logit.

    Raises:
        VerificationError: they differ, or ``stem`` is not affine.
    """
    generator = torch.Generator().manual_seed(0)
    pixels, others = torch.randn(2, 2, 3, 224, 224, generator=generator)
    expected = eager(pixels)
    logits, probabilities = served(pixels)

    def difference(values: Tensor, reference: Tensor) -> float:
        return ((values - reference).abs().max() / reference.abs().max().clamp_min(1e-6)).item()

    logit_difference = difference(logits, expected)
    checks = {"logits": logit_difference, "probabilities": difference(probabilities, expected.softmax(dim=1))}
    if hasattr(served, "stem"):
        between = served.stem(0.3 * pixels + 0.7 * others)
        checks["stem (not affine)"] = difference(0.3 * served.stem(pixels) + 0.7 * served.stem(others), between)
        checks["tail(stem(pixels))"] = difference(served.tail(served.stem(pixels)), expected)
    if hasattr(served, "mean_slope_tail"):
        # The mean gradient times the step must be the whole change of the output.
        features = served.stem(torch.cat((0.6 * pixels[:1] + 0.4 * others[:1], pixels[:1])))
        with torch.enable_grad(), torch.jit.optimized_execution(False):
            logits = served.mean_slope_tail(features.requires_grad_(), torch.tensor([True, False]))
            (gradients,) = torch.autograd.grad(logits[0].sum(), features)
        checks["mean_slope_tail"] = difference(logits, served.tail(features))
        change = (gradients[0] * (features[1] - features[0])).sum()
        checks["mean slopes"] = ((change - (logits[1] - logits[0]).sum()).abs() / logits.abs().sum()).item()
    for name, value in checks.items():
        if not value <= TOLERANCE:
            raise VerificationError(f"the exported {name} differ from the eager model by {value:.1e}")
    return logit_difference
