"""The drop-in does what Captum's class does, over generated modules, arguments, changes and orders of calls."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import captum.attr
import pytest
import torch
from captum_drop_in import IntegratedGradients
from drop_in_cases import DEPENDENT, FEATURES, INDEPENDENT, accelerated_calls, assert_same, build, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

QUICK, THOROUGH = 200, 2_000
# float32 rounding, and the narrower types' where Captum's own code answers, which is the same.
TOLERANCE = 2e-5


def usually(common: st.SearchStrategy, unusual: st.SearchStrategy) -> st.SearchStrategy:
    """The unusual in one case of eight: a call must be usual in every way to be accelerated."""
    return st.integers(0, 7).flatmap(lambda place: unusual if place == 5 else common)


MODULES = st.integers(0, 3).flatmap(lambda place: st.sampled_from([*(DEPENDENT if place == 2 else INDEPENDENT)]))
ANY_DTYPE = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
DTYPES = usually(st.sampled_from([torch.float32, torch.float32, torch.float64]), ANY_DTYPE)
METHODS = ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
TARGETS = st.one_of(
    st.integers(-5, 5),
    st.booleans(),
    st.none(),
    st.lists(st.integers(-1, 4), max_size=5),
    st.tuples(st.integers(0, 4)),
    st.lists(st.integers(0, 4), max_size=5).map(torch.tensor),
    st.lists(st.integers(0, 3), max_size=5).map(lambda targets: torch.tensor(targets, dtype=torch.int32)),
    st.integers(0, 3).map(torch.tensor),
)


@st.composite
def likely_targets(draw: Any, rows: int) -> Any:
    """One class for each row, as a list or a tensor; or one for all."""
    targets = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    return draw(st.sampled_from([targets, torch.tensor(targets), targets[0]]))


@st.composite
def rows_of(draw: Any, count: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
    values = (draw(st.sampled_from([0.0, 0.01, 1.0, 1.0, 30.0])) * values).to(dtype)
    return values.requires_grad_(draw(usually(st.just(False), st.just(True))))


@st.composite
def calls(draw: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Inputs and options of one call of a module of this dtype."""
    count = draw(st.integers(1, 4))
    inputs = draw(rows_of(count, draw(usually(st.just(dtype), ANY_DTYPE))))
    options = {
        "target": draw(usually(likely_targets(count), TARGETS)),
        "n_steps": draw(usually(st.integers(2, 20), st.sampled_from([0, 1, 2.0, True, -1]))),
        "method": draw(st.sampled_from(METHODS)),
        "internal_batch_size": draw(
            usually(st.one_of(st.none(), st.integers(4, 40)), st.one_of(st.integers(-2, 4), st.just(4.0)))
        ),
        "return_convergence_delta": draw(st.booleans()),
    }
    kind = draw(usually(st.sampled_from(["none", "number", "rows", "one row"]), st.sampled_from(["odd", "other"])))
    if kind in ("number", "odd"):
        options["baselines"] = draw(st.sampled_from([0, 0.5, -3] if kind == "number" else [True, float("nan")]))
    elif kind != "none":
        rows = {"rows": count, "one row": 1, "other": draw(st.integers(1, 4))}[kind]
        options["baselines"] = draw(rows_of(rows, inputs.dtype if kind != "other" else draw(ANY_DTYPE)))
    if draw(st.integers(0, 15)) == 7:
        options["additional_forward_args"] = draw(st.sampled_from([(), 2.0, (None, 2.0)]))
    return (inputs,) if draw(st.booleans()) else inputs, options


def scale(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data.mul_(1.5)


def replace(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data = weight.data + 0.1


# What happens to a module between two calls.
CHANGES = {
    "nothing": lambda module: None,
    "scaled weights": scale,
    "other weights": replace,
    "training": lambda module: module.train(),
    "evaluation": lambda module: module.eval(),
    "float64": lambda module: module.double(),
}


def sequences(dtype: torch.dtype) -> st.SearchStrategy:
    """The dtype of a module, and one to three calls, each with a change after it."""
    steps = st.tuples(calls(dtype), usually(st.sampled_from([*CHANGES][:3]), st.sampled_from([*CHANGES])))
    return st.tuples(st.just(dtype), st.lists(steps, min_size=1, max_size=3))


@lru_cache
def built(name: str, seed: int) -> nn.Module:
    return build(name, seed)


def check(name: str, seed: int, multiply: bool, dtype_and_calls: tuple[torch.dtype, list[Any]]) -> None:
    """The same calls of both classes, each with a module of its own that goes through the same changes."""
    dtype, sequence = dtype_and_calls
    modules = [copy.deepcopy(built(name, seed)).to(dtype) for _ in range(2)]
    ours = IntegratedGradients(modules[0], multiply, max_rows=1 + seed)
    captums = captum.attr.IntegratedGradients(modules[1], multiply)
    for (inputs, options), change in sequence:
        assert_same(outcome(ours, inputs, options), outcome(captums, inputs, options), TOLERANCE)
        for module in modules:
            CHANGES[change](module)


def run(cases: int) -> None:
    # The same examples each time: failures can be reproduced, and do not appear in unrelated changes.
    once = settings(
        max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    arguments = MODULES, st.integers(0, 8), st.booleans(), DTYPES.flatmap(sequences)
    with accelerated_calls() as accelerated:
        once(given(*arguments)(check))()
    assert len(accelerated) > cases / 2  # or the comparison would say nothing


def test_generated_calls_do_what_they_do_in_captum() -> None:
    run(QUICK)


@pytest.mark.slow
def test_many_generated_calls_do_what_they_do_in_captum() -> None:
    run(THOROUGH)
