"""Piecewise linear networks whose gradients are means over a stretch of a path instead of values at its points.

Where inputs of a network move along a straight path, a ReLU's input moves on a line from one evaluated point to the
next, nearly; the mean of its slope over that stretch is then (f(next) - f(here)) / (next - here), the quotient that
DeepLIFT's rescale rule (arXiv 1704.02685) uses over the whole path at once. Backpropagated through such mean slopes, a
network that is otherwise linear gives a gradient whose product with the step is the exact change of its output.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

# Layers and functions that are linear, or only rearrange or drop numbers.
LINEAR_LAYERS = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Dropout,
    nn.Identity,
)
LINEAR_FUNCTIONS = (
    operator.add,
    operator.iadd,
    torch.add,
    torch.cat,
    torch.flatten,
    nn.functional.adaptive_avg_pool2d,
    nn.functional.avg_pool2d,
)


class MeanSlopeActivation(nn.Module):
    """A ReLU, perhaps with a ceiling, whose slope in paired rows is the mean over the way to the next row."""

    def __init__(self, activation: nn.ReLU | nn.ReLU6) -> None:
        super().__init__()
        self.activation = activation
        self.ceiling = 6.0 if isinstance(activation, nn.ReLU6) else 0.0

    def forward(self, inputs: Tensor, paired: Tensor | None) -> Tensor:
        """``inputs`` [n, ...]; ``paired`` bool [n] or None, for no row."""
        if paired is None:
            return self.activation(inputs)
        here = inputs.detach()
        slopes = _mean_relu_slopes(here, paired)
        if self.ceiling > 0:
            slopes -= _mean_relu_slopes(here - self.ceiling, paired)
        # Its value is that of the activation, its derivative is the slope.
        rest = self.activation(here).addcmul_(here, slopes, value=-1.0)
        return torch.addcmul(rest, inputs, slopes)


def _mean_relu_slopes(here: Tensor, paired: Tensor, tiny: float = 1e-30) -> Tensor:
    """Mean slopes of max(x, 0): the larger end over the distance of the ends, if that is between 0 and 1.

    ``tiny`` makes it the slope at the point itself where nothing moves.
    """
    steps = torch.zeros_like(here)
    torch.sub(here[1:], here[:-1], out=steps[:-1])
    steps *= paired.to(here).view([-1] + [1] * (here.dim() - 1))
    larger = steps.relu().add_(here)
    return larger.div_(steps.abs_().add_(tiny)).clamp_(0.0, 1.0)


class MeanSlopeMaxPool(nn.Module):
    """Max pooling whose gradient in paired rows is shared with the place that leads in the next row.

    The share is the part of the way before one overtakes the other.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = pool.kernel_size, pool.stride, pool.padding
        self.dilation, self.ceil_mode = pool.dilation, pool.ceil_mode

    def forward(self, inputs: Tensor, paired: Tensor | None) -> Tensor:
        """``inputs`` [n, channels, height, width]; ``paired`` bool [n] or None, for no row."""
        values, places = nn.functional.max_pool2d_with_indices(
            inputs, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        if paired is None:
            return values
        flat = inputs.permute(0, 2, 3, 1).flatten(1, 2)  # [n, places, channels], as channels_last lies in memory
        leaders = places.permute(0, 2, 3, 1).flatten(1, 2)
        next_leaders = torch.where(paired.view(-1, 1, 1), torch.cat((leaders[1:], leaders[-1:])), leaders)
        both = torch.cat((leaders, next_leaders), dim=1)
        leading, following = flat.gather(1, both).chunk(2, dim=1)
        here = flat.detach()
        ahead_leading, ahead_following = torch.cat((here[1:], here[-1:])).gather(1, both).chunk(2, dim=1)
        lead = (leading - following).detach() + 1e-30  # where they are one, the share is 1
        share = lead / (lead + (ahead_following - ahead_leading))
        pooled = torch.lerp(following, leading, share)
        pooled = pooled + (leading - pooled).detach()  # the value is the leader's
        return pooled.view(values.shape[0], values.shape[2], values.shape[3], values.shape[1]).permute(0, 3, 1, 2)


_REPLACEMENTS = {nn.ReLU: MeanSlopeActivation, nn.ReLU6: MeanSlopeActivation, nn.MaxPool2d: MeanSlopeMaxPool}


def add_mean_slopes(network: torch.fx.GraphModule) -> bool:
    """Give a traced network of one input a second one, ``paired`` (bool [n], by default None).

    Returns:
        False, with the network as it was, if it has layers whose mean slopes are not known.
    """
    activations = []
    for node in network.graph.nodes:
        if node.op == "call_module":
            layer = network.get_submodule(node.target)
            if type(layer) in _REPLACEMENTS:
                activations.append(node)
            elif not isinstance(layer, LINEAR_LAYERS):
                return False
        elif node.op in ("call_method", "get_attr") or (
            node.op == "call_function" and node.target not in LINEAR_FUNCTIONS
        ):
            return False
    (features,) = (node for node in network.graph.nodes if node.op == "placeholder")
    with network.graph.inserting_after(features):
        paired = network.graph.placeholder("paired", type_expr=Tensor | None, default_value=None)
    for number, node in enumerate(activations):
        layer = network.get_submodule(node.target)
        # A name of its own for each call: a layer may be called more than once.
        name = f"mean_slope_{number}"
        network.add_submodule(name, _REPLACEMENTS[type(layer)](layer))
        node.target, node.args, node.kwargs = name, (node.args[0], paired), {}
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    return True
