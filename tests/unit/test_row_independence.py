"""What keeps a module from being accelerated, where nothing else about it would show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from row_independence import RowsError, count_classes, why_not_plain
from torch import Tensor, nn

IMAGE = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))


class Module(nn.Module):
    """A linear network after a change of its rows."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change, self.calls, self.linear = change, 0, nn.Linear(3, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(self.change(self, rows)).sin()


class Repeated(torch.autograd.Function):
    """Rows as they are, with gradients that grow with their number."""

    @staticmethod
    def forward(context, rows):
        return rows.clone()

    @staticmethod
    def backward(context, gradients):
        return gradients * len(gradients)


def count_calls(module: Module, rows: Tensor) -> Tensor:
    module.calls += 1
    return rows


CHANGES = {
    "it uses random numbers": [
        lambda _, rows: rows + 1e-30 * torch.rand(1),
        lambda _, rows: rows + 1e-30 * np.random.random(),
    ],
    r"depend on values \(aten._local_scalar_dense": [lambda _, rows: rows if rows.abs().max() != 3 else -rows],
    r"depend on values \(aten.index.Tensor": [lambda _, rows: rows + rows[rows == 3].sum()],
    "it changes with each call": [count_calls],
    "a row's values depend on other rows": [lambda _, rows: rows + rows.mean(0)],
    "a row's gradients depend on other rows": [lambda _, rows: Repeated.apply(rows)],
}


def module_of(change) -> nn.Module:
    torch.manual_seed(0)
    return Module(change).eval()


def test_independent_rows_are_found():
    assert count_classes(module_of(lambda _, rows: rows), IMAGE) == 4


@pytest.mark.parametrize(("why", "change"), [(why, change) for why, changes in CHANGES.items() for change in changes])
def test_each_dependence_is_named(why, change):
    with pytest.raises(RowsError, match=why):
        count_classes(module_of(change), IMAGE)


def test_training_alone_is_a_reason():
    module = module_of(lambda _, rows: rows)
    assert why_not_plain(module, IMAGE) == ""
    assert why_not_plain(module.train(), IMAGE) == "it is not in evaluation mode"
