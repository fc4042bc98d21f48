"""An image's time in a run is its own, without the wait for others."""

from __future__ import annotations

import pytest

from explain_client import runs
from explain_client.runs import SharedClock


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    shared = SharedClock()
    return shared, now


def test_eight_at_once_take_an_eighth_each(clock):
    shared, now = clock
    entered = [shared.enter() for _ in range(8)]
    now[0] += 16
    assert [shared.leave(each) for each in entered] == pytest.approx([2.0] * 8)


def test_shares_add_up_to_the_time_in_which_something_was_under_way(clock):
    shared, now = clock
    now[0] += 50  # nobody's
    first = shared.enter()
    now[0] += 1
    second = shared.enter()
    now[0] += 4
    assert shared.leave(first) == pytest.approx(1 + 4 / 2)
    now[0] += 3
    assert shared.leave(second) == pytest.approx(4 / 2 + 3)
    now[0] += 50
    assert shared.leave(shared.enter()) == 0
