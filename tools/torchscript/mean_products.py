"""Discrete gradients of operators that multiply or normalise, as modules that TorchScript can compile.

Each has the outputs of its operator. For a paired row its gradient is a discrete gradient: multiplied by the change of
the inputs to the next row, it is the exact change of the outputs. A chain of discrete gradients is one again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.torchscript.mean_slopes import next_rows, with_value


def _wide(values: Tensor) -> Tensor:
    """The same values, in float32 if they are float16: sums, squares and reciprocals would overflow there."""
    return values.float() if values.dtype == torch.float16 else values


class MeanProduct(nn.Module):
    """The product of two tensors, by elements or of matrices: d(uv) = mean(v) du + mean(u) dv."""

    def __init__(self, of_matrices: bool) -> None:
        super().__init__()
        self.of_matrices = of_matrices

    def forward(self, left: Tensor, right: Tensor, paired: Tensor | None) -> Tensor:
        """``left`` and ``right`` [n, ...]; ``paired`` bool [n]; None if no row is paired."""
        if paired is None:
            return self.product(left, right)
        mean_left = torch.lerp(left.detach(), next_rows(left.detach(), paired), 0.5)
        mean_right = torch.lerp(right.detach(), next_rows(right.detach(), paired), 0.5)
        outputs = self.product(left, mean_right) + self.product(mean_left, right)
        return with_value(outputs, self.product(left.detach(), right.detach()))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """The values."""
        return torch.matmul(left, right) if self.of_matrices else left * right


class MeanSoftmax(nn.Module):
    """Softmax p of x: dp = m (dx - sum(m dx) / sum(m)), where m are the logarithmic means of p here and there.

    The logarithm of p changes by dx minus a number that is the same for all of a row, and the changes of p add up to 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, inputs: Tensor, paired: Tensor | None) -> Tensor:
        """``inputs`` [n, ...]; ``paired`` bool [n]; None if no row is paired."""
        if paired is None:
            return inputs.softmax(self.dim)
        here = _wide(inputs.detach()).log_softmax(self.dim)
        following = next_rows(here, paired)
        # Both are minus infinity where a mask is.
        distance = (following - here).abs().nan_to_num(nan=0.0) + 1e-30
        means = torch.maximum(here, following).exp() * -torch.expm1(-distance) / distance
        moved = _wide(inputs) * means
        outputs = moved - moved.sum(self.dim, keepdim=True) * (means / means.sum(self.dim, keepdim=True))
        return with_value(outputs.to(inputs.dtype), inputs.detach().softmax(self.dim))


class MeanLayerNorm(nn.Module):
    """Layer normalisation as a product of centred values and the reciprocal of their standard deviation."""

    def __init__(self, normalized_shape: list[int], epsilon: float) -> None:
        super().__init__()
        self.normalized_shape = normalized_shape
        self.dims = [-1 - number for number in range(len(normalized_shape))]
        self.epsilon = epsilon

    def forward(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, paired: Tensor | None) -> Tensor:
        """``inputs`` [n, ..., *normalized_shape]; ``paired`` bool [n]; None if no row is paired."""
        if paired is None:
            return nn.functional.layer_norm(inputs, self.normalized_shape, weight, bias, self.epsilon)
        wide = _wide(inputs)
        centred = wide - wide.mean(self.dims, keepdim=True)
        here = centred.detach()
        following = next_rows(here, paired)
        deviation = (here.square().mean(self.dims, keepdim=True) + self.epsilon).sqrt()
        next_deviation = (following.square().mean(self.dims, keepdim=True) + self.epsilon).sqrt()
        middle = 0.5 * (here + following)
        # 1 / sqrt(variance) changes by this times the change of the variance.
        slope = -1 / (deviation * next_deviation * (deviation + next_deviation))
        variance = (centred * (2 * middle)).mean(self.dims, keepdim=True)
        outputs = centred * (0.5 * (1 / deviation + 1 / next_deviation)) + variance * (slope * middle)
        if weight is not None:
            outputs = outputs * weight
        if bias is not None:
            outputs = outputs + bias
        values = nn.functional.layer_norm(inputs.detach(), self.normalized_shape, weight, bias, self.epsilon)
        return with_value(outputs.to(inputs.dtype), values)


class MeanAttention(nn.Module):
    """Scaled dot product attention without a mask: two products of matrices and a softmax."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.product = MeanProduct(of_matrices=True)
        self.softmax = MeanSoftmax(-1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, paired: Tensor | None) -> Tensor:
        """``query``, ``key``, ``value`` [n, heads, tokens, width]; ``paired`` bool [n]; None if no row is paired."""
        if paired is None:
            return nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        scale = self.scale
        query = query * (query.size(-1) ** -0.5 if scale is None else scale)
        weights = self.softmax(self.product(query, key.transpose(-2, -1), paired), paired)
        outputs: Tensor = self.product(weights, value, paired)
        return outputs
