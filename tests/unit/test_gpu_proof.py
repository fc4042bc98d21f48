"""A part of the proof that fails or takes too long loses nothing that it has measured, and leaves nothing running."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tools.gpu_proof import __main__ as proof
from tools.gpu_proof import engine, part


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


def test_a_part_that_takes_too_long_is_stopped_and_older_results_are_gone(tmp_path):
    """It has not even imported what it needs."""
    (tmp_path / "parity.json").write_text("of an earlier run")
    started = time.monotonic()
    assert proof.run("parity", 0.2, tmp_path, quick=True).startswith("stopped after 0.2 s")
    assert time.monotonic() - started < proof.STOP_SECONDS
    assert not list(tmp_path.iterdir())


def test_processes_of_a_part_are_killed_wherever_they_have_gone():
    sleeping = [
        subprocess.Popen(["sleep", "60"], env={**os.environ, proof.MARK: mark}, start_new_session=True)
        for mark in ("one", "other")
    ]
    try:
        assert proof.kill_marked("one") == 1
        assert sleeping[0].wait(5) != 0
        assert sleeping[1].poll() is None
    finally:
        for process in sleeping:
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", proof.PARTS)
def test_each_part_has_measures(name):
    assert importlib.import_module(f"tools.gpu_proof.{name}").MEASURES


class Flagged:
    """Implementations that note whether convolutions may use TF32 when they run."""

    def __init__(self, precision: str) -> None:
        self.precision, self.images, self.captum, self.tuned_batch = precision, [None, None], precision, 8
        self.flags: list[bool] = []
        self.engine = SimpleNamespace(max_rows=2, passes=None, network=None, density=None)

    def tune(self) -> None:
        self.tuned_batch = 5

    def run(self, *_: object, **options: object) -> None:
        self.flags.append(torch.backends.cudnn.allow_tf32)

    run_engine = run_options = run_captum = run_tuned = run


@pytest.mark.parametrize("measure", [engine.compare_single, engine.compare_batch], ids=["one image", "batch"])
def test_each_figure_is_of_the_precision_that_it_names(monkeypatch, measure, tmp_path):
    built = {precision: Flagged(precision) for precision in engine.PRECISIONS}
    monkeypatch.setattr(engine, "kept", lambda precision, batch: built[precision])
    monkeypatch.setattr(engine, "AttributionEngine", lambda *_, **__: SimpleNamespace())
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        measure(part.Record(tmp_path / "engine.json", quick=True))
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    for precision, contestants in built.items():
        assert set(contestants.flags) == {precision != "ieee"}
        assert contestants.captum == "tf32"
    assert len({contestants.tuned_batch for contestants in built.values()}) == 1
