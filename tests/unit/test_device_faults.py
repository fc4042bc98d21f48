"""Faults of a device, injected into the engine."""

from __future__ import annotations

import logging
import queue

import pytest
import torch
from attribution_engine import AttributionEngine
from conftest import relative_distance, small_job
from gradient_worker import GradientWorker
from request_admission import Admission


def fail_passes(engine, fails):
    """Make a pass raise what ``fails`` returns for its number of rows."""
    gradients = engine.passes.gradients
    sizes = []

    def failing(rows, count, *rest):
        if (failure := fails(count)) is not None:
            raise failure
        sizes.append(count)
        return gradients(rows, count, *rest)

    engine.passes.gradients = failing
    return sizes


@pytest.mark.parametrize("options", [{"n_steps": 21}, {"n_steps": 21, "method": "calibrated"}, {"tolerance": 0.02}])
def test_a_chunk_without_memory_is_halved_until_it_fits(served_module, options):
    from tools.evaluation.measuring import load_engine

    engine = load_engine(torch.device("cpu"), "ieee")
    jobs = [small_job(seed=seed, **{"n_steps": 200, **options}) for seed in range(2)]
    expected = engine.explain(jobs)
    sizes = fail_passes(engine, lambda count: torch.OutOfMemoryError("none left") if count > 3 else None)
    for explanation, wanted in zip(engine.explain(jobs), expected):
        assert relative_distance(explanation.attributions, wanted.attributions) <= 1e-5
        assert explanation.n_steps == wanted.n_steps
    assert max(sizes) <= 3


def test_memory_that_comes_back_is_used_again(engine):
    failures = iter([torch.OutOfMemoryError("none left")])
    sizes = fail_passes(engine, lambda count: next(failures, None))
    engine.explain([small_job(24)])
    assert sizes == [4, 7, 7, 6] or (sizes[0] == 4 and max(sizes) > 4)


def test_no_memory_for_a_single_row_fails_what_is_under_way_alone(engine):
    fails = {"now": True}
    fail_passes(engine, lambda count: torch.OutOfMemoryError("none left") if fails["now"] else None)
    done: queue.Queue = queue.Queue()
    worker = GradientWorker(engine, torch.device("cpu"), Admission(60, 100))
    try:
        worker.submit([small_job(8)], lambda *outcome: done.put(outcome))
        assert isinstance(done.get(timeout=20)[1], torch.OutOfMemoryError)
        fails["now"] = False
        worker.submit([small_job(8)], lambda *outcome: done.put(outcome))
        assert done.get(timeout=20)[1].n_steps == 8
    finally:
        worker.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs can be captured here")
def test_passes_that_cannot_be_captured_run_one_by_one_and_say_so_once(served_module, caplog):
    engine = AttributionEngine(served_module, capture=True)
    (expected,) = AttributionEngine(served_module).explain([small_job(20)])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (explanation,) = engine.explain([small_job(20)])
            assert relative_distance(explanation.attributions, expected.attributions) <= 1e-5
    assert sum("no CUDA graphs" in record.message for record in caplog.records) == 1
