"""How `preprocess` learns that the gradient worker is full."""

from __future__ import annotations

import os
import struct

import pytest
from attribution_parameters import read_parameters
from circuit_breaker import MOST_SECONDS, SECONDS, CircuitBreaker, CircuitOpenError, check_circuit


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def is_refused(folder, **parameters) -> bool:
    asked = read_parameters(parameters)
    assert asked is not None
    try:
        check_circuit(7, asked, folder)
    except CircuitOpenError:
        return True
    return False


def test_requests_as_large_as_one_that_was_refused_are_turned_away_for_a_while(tmp_path, clock):
    assert not is_refused(tmp_path)
    breaker = CircuitBreaker(7, 12, tmp_path)
    breaker.open(20)
    assert is_refused(tmp_path, n_steps=20)
    assert is_refused(tmp_path)  # 50
    assert is_refused(tmp_path, n_steps="10", nt_samples=2)
    assert not is_refused(tmp_path, n_steps=19)
    assert not is_refused(tmp_path, tolerance=0.05)  # 12
    assert is_refused(tmp_path, tolerance=0.05, nt_samples=2)
    assert not is_refused(tmp_path, tolerance=0.05, nt_samples=5, n_steps=3)
    assert not is_refused(tmp_path, deadline_ms=100)
    clock[0] += SECONDS
    assert not is_refused(tmp_path)


def test_the_longest_word_is_heard(tmp_path, clock):
    CircuitBreaker(7, 12, tmp_path).open(20, seconds=1e9)
    assert is_refused(tmp_path)
    clock[0] += MOST_SECONDS
    assert not is_refused(tmp_path)


def test_the_smallest_that_was_refused_counts(tmp_path, clock):
    breaker = CircuitBreaker(7, 12, tmp_path)
    breaker.open(20)
    breaker.open(100)
    assert is_refused(tmp_path, n_steps=20)
    clock[0] += 2 * SECONDS
    breaker.open(100)
    assert not is_refused(tmp_path, n_steps=20)


def test_other_servers_and_broken_words_say_nothing(tmp_path, clock):
    CircuitBreaker(8, 12, tmp_path).open(1)
    assert not is_refused(tmp_path)
    (tmp_path / "integrated_gradients_7.breaker").write_bytes(b"half")
    assert not is_refused(tmp_path)
    CircuitBreaker(7, 12, tmp_path).open(1)
    assert is_refused(tmp_path)
    CircuitBreaker(7, 12, tmp_path).remove()
    assert not is_refused(tmp_path)


def test_words_that_the_gradients_cannot_have_written_say_nothing(tmp_path, clock, monkeypatch):
    file = tmp_path / "integrated_gradients_7.breaker"
    file.write_bytes(struct.pack("<ddd", clock[0] + 1e9, 0.0, 12.0))  # for ever
    assert not is_refused(tmp_path)
    file.write_bytes(struct.pack("<ddd", clock[0] + 1, 0.0, 12.0))
    assert is_refused(tmp_path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert not is_refused(tmp_path)
    CircuitBreaker(7, 12, tmp_path).open(1)  # nothing is written through it either
    assert (tmp_path / "elsewhere").read_bytes() == struct.pack("<ddd", clock[0] + 1, 0.0, 12.0)
    file.unlink()
    CircuitBreaker(7, 12, tmp_path).open(1)
    assert is_refused(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)  # another user's
    assert not is_refused(tmp_path)
