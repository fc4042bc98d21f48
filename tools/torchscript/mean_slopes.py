"""Piecewise linear networks whose gradients are means over a segment of a path instead of values at its points.

If a network's input moves along a straight path, a ReLU's input moves nearly on a line from one evaluated point to the
next. The mean of the ReLU's slope over that segment is then (f(next) - f(here)) / (next - here). DeepLIFT's rescale
rule (arXiv 1704.02685) uses this quotient over the whole path at once. Backpropagation through such mean slopes, in a
network that is otherwise linear, gives a gradient whose product with the step is the exact change of its output.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

# Layers and functions that are linear, or only rearrange or drop values.
LINEAR_LAYERS = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Dropout,
    nn.Identity,
    nn.ZeroPad2d,
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
    """A ReLU or ReLU6 whose slope in paired rows is the mean over the segment to the next row."""

    def __init__(self, activation: nn.ReLU | nn.ReLU6) -> None:
        super().__init__()
        self.activation = activation
        self.ceiling = 6.0 if isinstance(activation, nn.ReLU6) else 0.0

    def forward(self, inputs: Tensor, paired: Tensor | None) -> Tensor:
        """``inputs`` [n, ...]; ``paired`` bool [n]; None if no row is paired."""
        if paired is None:
            return self.activation(inputs)
        here = inputs.detach()
        if here.dtype == torch.float16:  # float16 cannot represent the number that prevents 0 / 0
            here = here.float()
        slopes = _mean_relu_slopes(here, paired)
        if self.ceiling > 0:
            slopes -= _mean_relu_slopes(here - self.ceiling, paired)
        return _with_value(inputs * slopes.to(inputs.dtype), self.activation(inputs.detach()))


def _with_value(outputs: Tensor, values: Tensor) -> Tensor:
    """Overwrite the values of ``outputs`` but not their gradient; copies nothing that autograd saves."""
    outputs.detach().copy_(values)
    return outputs


def _mean_relu_slopes(here: Tensor, paired: Tensor, tiny: float = 1e-30) -> Tensor:
    """Mean slopes of max(x, 0) from each row to the next, 0 where they are equal; slopes at the point if not paired."""
    values = here.relu()
    # For a row that is not paired the next one counts as 0: the quotient is then the slope at the point.
    following = paired[:-1].to(here).view([-1] + [1] * (here.dim() - 1))
    slopes = torch.empty_like(here)
    torch.addcmul(values[:-1], values[1:], following, value=-1.0, out=slopes[:-1])
    slopes[:-1].div_(torch.addcmul(here[:-1], here[1:], following, value=-1.0).add_(tiny))
    torch.gt(here[-1:], 0.0, out=slopes[-1:])
    return slopes


class MeanSlopeMaxPool(nn.Module):
    """Max pooling whose gradient in paired rows is divided between this row's maximum and the next row's.

    Each gets the share of the segment on which it is the larger one.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.kernel_size, self.stride = _pair(pool.kernel_size), _pair(pool.stride)
        self.padding, self.dilation = _pair(pool.padding), _pair(pool.dilation)
        self.ceil_mode = pool.ceil_mode

    def forward(self, inputs: Tensor, paired: Tensor | None) -> Tensor:
        """``inputs`` [n, channels, height, width]; ``paired`` bool [n]; None if no row is paired."""
        values, places = nn.functional.max_pool2d_with_indices(
            inputs, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        if paired is None:
            return values
        changes = (places[:-1] != places[1:]) & paired[:-1].view(-1, 1, 1, 1)
        changes = changes.permute(0, 2, 3, 1).reshape(-1)  # the order of channels_last in memory
        if inputs.is_cuda:  # all places: under graph capture their number must not depend on the data
            return share_gradients(inputs, values, places, torch.arange(changes.numel(), device=inputs.device), changes)
        changed = changes.nonzero()[:, 0]
        return share_gradients(inputs, values, places, changed, changes[changed]) if len(changed) > 0 else values


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A value for height and one for width."""
    return (value, value) if isinstance(value, int) else value


def share_gradients(
    inputs: Tensor, values: Tensor, leaders: Tensor, at: Tensor, is_changed: Tensor, tiny: float = 1e-30
) -> Tensor:
    """``values`` of max pooling; where ``is_changed``, the gradient of a value goes to two places of ``inputs``.

    Args:
        inputs: [n, channels, height, width].
        values: [n, channels, height, width] after pooling.
        leaders: int64, shaped like ``values``: the place of each maximum in its channel of ``inputs``.
        at: int64 [k], flat indices into ``values`` in channels_last order, without the last row.
        is_changed: bool [k], whether the maximum is at another place in the next row.
    """
    rows, channels, height, width = values.shape
    row, input_row = values[0].numel(), inputs[0].numel()
    flat_values, flat_inputs, flat_leaders = (
        tensor.permute(0, 2, 3, 1).reshape(-1) for tensor in (values, inputs, leaders)
    )
    first = torch.div(at, row, rounding_mode="floor") * input_row + at % channels
    leading_at = first + flat_leaders[at] * channels
    following_at = first + flat_leaders[at + row] * channels
    leading, following = flat_values.index_select(0, at), flat_inputs.index_select(0, following_at)
    wide = torch.float32 if values.dtype == torch.float16 else values.dtype  # float16 would round tiny to 0
    lead = (leading - following).detach().to(wide) + tiny  # if both are the same place, it gets all
    lead_of_following = (flat_values[at + row] - flat_inputs[leading_at + input_row]).detach()
    share = lead_of_following / (lead + lead_of_following) * is_changed
    moved = (following - leading) * share.to(values.dtype)
    shared = flat_values.index_add(0, at, moved - moved.detach())
    return shared.view(rows, height, width, channels).permute(0, 3, 1, 2)


_REPLACEMENTS = {nn.ReLU: MeanSlopeActivation, nn.ReLU6: MeanSlopeActivation, nn.MaxPool2d: MeanSlopeMaxPool}


def add_mean_slopes(network: torch.fx.GraphModule) -> bool:
    """Add a second input, ``paired`` (bool [n], default None), to a traced network of one input.

    Returns:
        Whether it was added; not if the network has layers whose mean slopes are not known.
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
        # One name for each call: a layer may be called more than once.
        name = f"mean_slope_{number}"
        network.add_submodule(name, _REPLACEMENTS[type(layer)](layer))
        node.target, node.args, node.kwargs = name, (node.all_input_nodes[0], paired), {}
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    return True
