"""Small modules, and whether the drop-in may accelerate them; and how its answers are compared with Captum's."""

# TorchScript takes comments on single lines for its own.
# mypy: disable-error-code="operator, assignment"

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import captum.attr
import pytest
import torch
from attribution_engine import AttributionEngine
from captum_drop_in import IntegratedGradients
from torch import Tensor, nn

FEATURES, CLASSES = 3, 4


class Scores(nn.Module):
    """Rows [n, 3] -> scores [n, 4], by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.last(self.first(rows).relu())
        return scores


class StemAndTail(nn.Module):
    """Has parts of these names, and something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)
        self.limitation = ""

    def forward(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.tail(self.stem(rows).relu())
        return scores


class Changed(Scores):
    """``Scores`` with something done to its rows first, or to its scores last."""

    def __init__(
        self, first: Callable[..., Tensor] = lambda rows: rows, last: Callable[..., Any] = lambda s: s
    ) -> None:
        super().__init__()
        self.before, self.after = first, last

    def forward(self, rows: Tensor) -> Any:
        return self.after(super().forward(self.before(rows)))


class Counting(Scores):
    """Answers by the number of earlier calls."""

    def __init__(self, in_buffer: bool = False) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("calls_seen", torch.zeros(()))
        self.in_buffer = in_buffer

    def forward(self, rows: Tensor) -> Tensor:
        if self.in_buffer:
            self.calls_seen += 1
            rows = rows * self.calls_seen
        else:
            self.calls += 1
            rows = rows * self.calls
        scores: Tensor = self.last(self.first(rows).relu())
        return scores


class Remembering(Scores):
    """Keeps the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.append(len(rows))
        return super().forward(rows)


class Branching(Scores):
    """Decides by values which only some rows have."""

    def forward(self, rows: Tensor) -> Tensor:
        if bool(rows.sum() < 2):
            rows = rows.abs()
        scores: Tensor = self.last(self.first(rows).relu())
        return scores


class NormedBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        shared: Tensor = gradients[0] / gradients[0].norm()
        return shared


class TwoInputs(nn.Module):
    """Scores of one or two inputs, scaled by an extra argument."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = Scores()

    def forward(self, rows: Tensor, others: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if others is not None:
            rows = rows * others
        scores: Tensor = scale * self.scores(rows)
        return scores


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 4, (1, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)
    )


# What the engine must take.
INDEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "two layers": Scores,
    "softmax": lambda: nn.Sequential(Scores(), nn.Softmax(dim=1)),
    "convolutions": convolutions,
    "a part called stem and one called tail": StemAndTail,
    "batch normalisation": lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, CLASSES)),
    "layer normalisation": lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)),
    "dropout": lambda: nn.Sequential(Scores(), nn.Dropout(0.5)),
    "scripted": lambda: torch.jit.script(Scores()),
    "traced": lambda: torch.jit.trace(Scores(), torch.zeros(2, FEATURES)),
    "scripted, with parts of these names": lambda: torch.jit.script(StemAndTail()),
    "scripted, of one input or two": lambda: torch.jit.script(TwoInputs()),
    "chosen places": lambda: Changed(lambda rows: rows[:, [2, 0, 1]]),
}
# What it must not take.
DEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "centred rows": lambda: Changed(lambda rows: rows - rows.mean(0)),
    "hardly centred rows": lambda: Changed(lambda rows: rows - 1e-7 * rows.mean(0)),
    "a threshold on the largest": lambda: Changed(lambda rows: torch.where(rows.max() > 2, rows, rows.sin())),
    "the rows before": lambda: Changed(lambda rows: rows.cumsum(0)),
    "rows in reverse": lambda: Changed(lambda rows: rows.flip(0)),
    "pairs of rows": lambda: Changed(lambda rows: rows.view(-1, 2, FEATURES).flip(1).reshape(-1, FEATURES)),
    "the number of rows": lambda: Changed(lambda rows: rows * len(rows)),
    "attention between rows": lambda: nn.Sequential(
        nn.Linear(FEATURES, CLASSES), nn.TransformerEncoderLayer(CLASSES, 2, 8)
    ),
    "gradients scaled together": lambda: Changed(NormedBackward.apply),
    "twice as many rows": lambda: Changed(last=lambda scores: torch.cat((scores, scores))),
    "one row": lambda: Changed(last=lambda scores: scores.sum(0, keepdim=True)),
    "a tuple": lambda: Changed(last=lambda scores: (scores, scores.softmax(1))),
    "a list": lambda: Changed(last=lambda scores: [scores]),
    "one score a row": lambda: Changed(last=lambda scores: scores[:, 0]),
    "scores in a grid": lambda: Changed(last=lambda scores: scores.view(-1, 2, 2)),
    "no gradients": lambda: Changed(last=lambda scores: scores.detach()),
    "other dtype": lambda: Changed(last=lambda scores: scores.bfloat16()),
    "a scripted tuple": lambda: torch.jit.script(Pair()),
    "calls counted": Counting,
    "calls counted in a buffer": lambda: Counting(in_buffer=True),
    "calls counted by TorchScript": lambda: torch.jit.script(Counting(in_buffer=True)),
    "rows remembered": Remembering,
    "a branch": Branching,
    "a scripted branch": lambda: torch.jit.script(Branching()),
    "selected values": lambda: Changed(lambda rows: rows * rows[rows > 0].sum()),
    "dropout in evaluation": lambda: Changed(nn.functional.dropout),
    "training, with batch normalisation": lambda: training(INDEPENDENT["batch normalisation"]()),
    "training, with dropout": lambda: training(INDEPENDENT["dropout"]()),
    "a failure": lambda: Changed(lambda rows: rows @ rows),
}


class Pair(Scores):
    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = self.last(self.first(rows).relu())
        return scores, scores.softmax(1)


def training(module: nn.Module) -> nn.Module:
    module.trains = True
    return module


def build(name: str, seed: int = 0) -> nn.Module:
    """A case's module with seeded weights, in evaluation mode unless the case is about another."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = (INDEPENDENT | DEPENDENT)[name]()
    return module.train(hasattr(module, "trains"))


@contextmanager
def accelerated_calls() -> Iterator[list[int]]:
    """Collects the numbers of jobs that engines explain meanwhile."""
    calls: list[int] = []
    explain = AttributionEngine.explain

    def explain_and_note(engine: AttributionEngine, jobs: Any, *args: Any, **options: Any) -> Any:
        explanations = explain(engine, jobs, *args, **options)
        calls.append(len(jobs))
        return explanations

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttributionEngine, "explain", explain_and_note)
        yield calls


def outcome(attribution: Any, inputs: Any, options: dict[str, Any]) -> Any:
    """What ``attribute`` returns and warns of, or the type of what it raises."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            answer = attribution.attribute(inputs, **options)
        except Exception as error:  # whatever Captum raises
            return type(error)
    return answer, [str(each.message) for each in noted if "Internal batch size" in str(each.message)]


def assert_same(ours: Any, captums: Any, tolerance: float = 1e-5) -> None:
    """Equal in structure, types, warnings, whether gradients are kept, and values within rounding."""
    if isinstance(captums, (type, str)) or isinstance(ours, (type, str)):
        assert ours is captums or ours == captums
    elif isinstance(captums, (tuple, list)):
        assert type(ours) is type(captums)
        assert len(ours) == len(captums)
        for each, other in zip(ours, captums):
            assert_same(each, other, tolerance)
    else:
        assert ours.requires_grad == captums.requires_grad
        size = max(1.0, captums.detach().abs().nan_to_num().max().item()) if captums.numel() else 1.0
        torch.testing.assert_close(ours, captums, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def assert_answers_as_captum(module: Any, inputs: Any, options: dict[str, Any], multiply: bool = True) -> None:
    """The drop-in's and Captum's outcome for copies of one module."""
    module, other = (module, copy.deepcopy(module)) if isinstance(module, nn.Module) else (module, module)
    ours = outcome(IntegratedGradients(module, multiply), inputs, options)
    assert_same(ours, outcome(captum.attr.IntegratedGradients(other, multiply), inputs, options))
