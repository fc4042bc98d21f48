"""Discrete gradients of functions of one variable and of max pooling, as modules that TorchScript can compile.

If a network's input moves along a straight path, a ReLU's input moves nearly on a line from one evaluated point to the
next. The mean of the ReLU's slope over that segment is then (f(next) - f(here)) / (next - here). DeepLIFT's rescale
rule (arXiv 1704.02685) uses this quotient over the whole path at once. Backpropagation through such mean slopes, in a
network that is otherwise linear, gives a gradient whose product with the step is the exact change of its output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Least change of a function's argument for which its mean slope is a quotient, times the function's value if that is
# above 1. The rounding of float32 is then below 1e-4 of the slope. Where the argument changes less, the slope in the
# middle stands for the mean.
LEAST_CHANGE = 1e-3
# For slopes at points; float64 rounds them by 1e-12.
HALF_WIDTH = 5e-5


class MeanSlopeRelu(nn.Module):
    """A ReLU, up to ``ceiling`` if that is positive, whose slope in paired rows is the mean over the segment."""

    def __init__(self, ceiling: float = 0.0) -> None:
        super().__init__()
        self.ceiling = ceiling

    def forward(self, inputs: Tensor, paired: Tensor | None) -> Tensor:
        """``inputs`` [n, ...]; ``paired`` bool [n]; None if no row is paired."""
        if paired is None:
            return self.values(inputs)
        here = inputs.detach()
        if here.dtype == torch.float16:  # float16 cannot represent the number that prevents 0 / 0
            here = here.float()
        slopes = self.slopes(here, paired) if inputs.is_cuda else self.slopes_by_row(here, paired)
        outputs = inputs * slopes.to(inputs.dtype)
        if self.ceiling > 0:
            torch.clamp(inputs.detach(), 0.0, self.ceiling, out=outputs.detach())
        else:
            torch.clamp(inputs.detach(), 0.0, out=outputs.detach())
        return outputs

    def values(self, inputs: Tensor) -> Tensor:
        """The values."""
        return nn.functional.hardtanh(inputs, 0.0, self.ceiling) if self.ceiling > 0 else inputs.relu()

    def slopes(self, here: Tensor, paired: Tensor) -> Tensor:
        """Slopes of all rows at once; 0 where a paired row's inputs stay."""
        slopes = _mean_relu_slopes(here, paired)
        return slopes - _mean_relu_slopes(here - self.ceiling, paired) if self.ceiling > 0 else slopes

    def slopes_by_row(self, here: Tensor, paired: Tensor) -> Tensor:
        """The same. One row after the other fits a processor's cache."""
        slopes = torch.empty_like(here)
        values = self.values(here[0])
        for row in range(len(here)):
            is_last = row + 1 == len(here)
            next_values = values if is_last else self.values(here[row + 1])
            if is_last or not bool(paired[row]):
                is_rising = values > 0
                slopes[row] = is_rising & (values < self.ceiling) if self.ceiling > 0 else is_rising
            else:
                changes = (here[row + 1] - here[row]).add_(1e-30)
                torch.sub(next_values, values, out=slopes[row]).div_(changes)
            values = next_values
        return slopes


class MeanSlopeFunction(nn.Module):
    """Any function of one variable, whose slope in paired rows is the mean over the segment to the next row."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.least_change, self.half_width = LEAST_CHANGE, HALF_WIDTH

    def forward(self, inputs: Tensor, paired: Tensor | None) -> Tensor:
        """``inputs`` [n, ...]; ``paired`` bool [n]; None if no row is paired."""
        if paired is None:
            return self.function(inputs)
        here = inputs.detach()
        if here.dtype == torch.float16:  # its rounding would be a part of the differences
            here = here.float()
        is_image = here.dim() == 4  # in memory as channels_last
        here = (here.permute(0, 2, 3, 1) if is_image else here).contiguous()
        values = self.function(here)
        slopes = self.slopes(here, values, paired) if inputs.is_cuda else self.slopes_by_row(here, values, paired)
        if is_image:
            slopes, values = slopes.permute(0, 3, 1, 2), values.permute(0, 3, 1, 2)
        return with_value(inputs * slopes.to(inputs.dtype), values)

    def slopes(self, here: Tensor, values: Tensor, paired: Tensor) -> Tensor:
        """Slopes of all rows at once. No shape depends on the data, so that a graph of a GPU can be captured."""
        changes = next_rows(here, paired) - here
        quotients = (next_rows(values, paired) - values) / changes
        is_small = changes.abs() < values.abs().clamp_min(1.0) * self.least_change
        return torch.where(is_small, self.derivative(here + 0.5 * changes), quotients)

    def slopes_by_row(self, here: Tensor, values: Tensor, paired: Tensor) -> Tensor:
        """The same. One row after the other fits a processor's cache."""
        slopes = torch.empty_like(here)
        for row in range(len(here)):
            if row + 1 == len(here) or not bool(paired[row]):
                slopes[row] = self.derivative(here[row])
                continue
            changes = here[row + 1] - here[row]
            torch.sub(values[row + 1], values[row], out=slopes[row]).div_(changes)
            is_small = changes.abs() < values[row].abs().clamp_min(1.0) * self.least_change
            small = is_small.view(-1).nonzero()[:, 0]
            middle = here[row].view(-1)[small] + 0.5 * changes.view(-1)[small]
            slopes[row].view(-1).index_copy_(0, small, self.derivative(middle))
        return slopes

    def derivative(self, points: Tensor) -> Tensor:
        """The slope at points, as a central difference in float64."""
        low, high = points.double() - self.half_width, points.double() + self.half_width
        return ((self.function(high) - self.function(low)) / (2 * self.half_width)).to(points.dtype)


def next_rows(here: Tensor, paired: Tensor) -> Tensor:
    """For paired rows the next row of ``here`` [n, ...], for others the row itself."""
    following = torch.cat((here[1:], here[-1:]))
    return torch.where(paired.view([-1] + [1] * (here.dim() - 1)), following, here)


def with_value(outputs: Tensor, values: Tensor) -> Tensor:
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

    def __init__(
        self,
        kernel_size: list[int],
        stride: list[int] | None = None,
        padding: list[int] | None = None,
        dilation: list[int] | None = None,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride or kernel_size
        self.padding, self.dilation = padding or [0, 0], dilation or [1, 1]
        self.ceil_mode = ceil_mode

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
