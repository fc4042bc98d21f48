"""A part of the proof that fails or takes too long loses nothing that it has measured, and the next one follows."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import pytest

from tools.gpu_proof import __main__ as proof
from tools.gpu_proof import part


def fail(record: part.Record) -> None:
    record["before"] = [1.23456789]
    raise RuntimeError("no kernel image")


def succeed(record: part.Record) -> None:
    record["after"] = record.quick


def test_a_measure_that_fails_says_why_and_the_next_one_follows(monkeypatch, tmp_path):
    file = tmp_path / "parity.json"
    monkeypatch.setitem(sys.modules, "tools.gpu_proof.parity", SimpleNamespace(MEASURES={"one": fail, "two": succeed}))
    monkeypatch.setattr(part, "stop_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["part", "parity", "--out", str(file), "--quick"])
    with pytest.raises(SystemExit) as ended:
        part.main()
    assert ended.value.code == 1
    results = json.loads(file.read_text())
    assert results["before"] == [1.23457]
    assert results["after"] is True
    assert results["one failed"][-1] == "RuntimeError: no kernel image"


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    """It has not even imported what it needs."""
    started = time.monotonic()
    assert proof.run("parity", 0.2, tmp_path, quick=True).startswith("stopped after 0.2 s")
    assert time.monotonic() - started < proof.STOP_SECONDS


@pytest.mark.parametrize("name", part.PARTS)
def test_each_part_has_measures(name):
    assert __import__(f"tools.gpu_proof.{name}", fromlist=["MEASURES"]).MEASURES
