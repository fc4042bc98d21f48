"""The word of the gradients to `preprocess` that they take no more."""

from __future__ import annotations

import os
import struct

import pytest
from overload_notice import MOST_SECONDS, SECONDS, OverloadNotice
from overload_reading import OverloadedError, check_overload, gradients_asked


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def is_refused(folder, **parameters) -> bool:
    try:
        check_overload(7, parameters, folder)
    except OverloadedError:
        return True
    return False


def test_requests_as_large_as_one_that_was_refused_are_turned_away_for_a_while(tmp_path, clock):
    assert not is_refused(tmp_path)
    notice = OverloadNotice(7, tmp_path)
    notice.post(20)
    assert is_refused(tmp_path, n_steps=20)
    assert is_refused(tmp_path)  # 50
    assert is_refused(tmp_path, n_steps="10", nt_samples=2)
    assert not is_refused(tmp_path, n_steps=19)
    assert not is_refused(tmp_path, tolerance=0.05)
    assert not is_refused(tmp_path, deadline_ms=100)
    clock[0] += SECONDS
    assert not is_refused(tmp_path)


def test_the_longest_word_is_heard(tmp_path, clock):
    OverloadNotice(7, tmp_path).post(20, seconds=1e9)
    assert is_refused(tmp_path)
    clock[0] += MOST_SECONDS
    assert not is_refused(tmp_path)


def test_the_smallest_that_was_refused_counts(tmp_path, clock):
    notice = OverloadNotice(7, tmp_path)
    notice.post(20)
    notice.post(100)
    assert is_refused(tmp_path, n_steps=20)
    clock[0] += 2 * SECONDS
    notice.post(100)
    assert not is_refused(tmp_path, n_steps=20)


def test_other_servers_and_broken_words_say_nothing(tmp_path, clock):
    OverloadNotice(8, tmp_path).post(1)
    assert not is_refused(tmp_path)
    (tmp_path / "integrated_gradients_7.notice").write_bytes(b"half")
    assert not is_refused(tmp_path)
    OverloadNotice(7, tmp_path).post(1)
    assert is_refused(tmp_path)
    OverloadNotice(7, tmp_path).remove()
    assert not is_refused(tmp_path)


def test_words_that_the_gradients_cannot_have_written_say_nothing(tmp_path, clock, monkeypatch):
    file = tmp_path / "integrated_gradients_7.notice"
    file.write_bytes(struct.pack("<dd", clock[0] + 1e9, 0.0))  # for ever
    assert not is_refused(tmp_path)
    file.write_bytes(struct.pack("<dd", clock[0] + 1, 0.0))
    assert is_refused(tmp_path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert not is_refused(tmp_path)
    OverloadNotice(7, tmp_path).post(1)  # nor is anything written through it
    assert (tmp_path / "elsewhere").read_bytes() == struct.pack("<dd", clock[0] + 1, 0.0)
    file.unlink()
    OverloadNotice(7, tmp_path).post(1)
    assert is_refused(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)  # another user's
    assert not is_refused(tmp_path)


def test_parameters_that_are_not_valid_are_for_the_gradients_to_refuse():
    assert gradients_asked({"n_steps": "many"}) == 0
    assert gradients_asked({"n_steps": 3, "nt_samples": None}) == 0
