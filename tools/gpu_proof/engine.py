"""Speed of the engine by itself: precisions, CUDA graphs, rows a pass, batches, and errors of each precision."""

from __future__ import annotations

import copy
import time
from functools import cache, partial
from typing import Any

import torch
from attribution_engine import AttributionEngine
from engine_loading import PRECISIONS

from tools.bench import engine as bench
from tools.evaluation.measuring import default_device, explain, interleaved, medians, timed
from tools.gpu_proof.part import Record

DEVICE = default_device()
BATCH, STEPS, CALIBRATED_STEPS = 32, 50, 16


def measure_rates(record: Record) -> None:
    """The device's own: products of large matrices by each dtype, in TFLOP/s, and a copy, in GB/s read and written."""
    side, repeats = (512, 2) if record.quick else (8192, 10)
    rates: dict[str, float] = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("float16", torch.float16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        matrix = torch.randn(side, side, device=DEVICE).to(dtype)
        rates[f"product, {name}, TFLOP/s"] = (
            2 * side**3 * repeats / _seconds(partial(torch.matmul, matrix, matrix), repeats) / 1e12
        )
    memory = torch.empty(2**24 if record.quick else 2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(memory)
    rates["copy, GB/s"] = 2 * memory.numel() * repeats / _seconds(lambda: target.copy_(memory), repeats) / 1e9
    record["rates"] = rates


def _seconds(run: Any, repeats: int) -> float:
    """Of so many runs, after one."""
    run()
    _wait()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@cache
def contestants(precision: str, batch: int) -> bench.Contestants:
    return bench.Contestants(DEVICE, precision, batch)


def compare_single(record: Record) -> None:
    """Median seconds of one image, by precision: with graphs, without, calibrated; and Captum's."""
    for precision in PRECISIONS:
        ours = contestants(precision, 2 if record.quick else BATCH)
        launched = copy.copy(ours)
        launched.engine = AttributionEngine(ours.engine.network, ours.engine.max_rows, density=ours.engine.density)
        if precision == PRECISIONS[0]:
            ours.tune()
        runs = {
            f"{STEPS} steps": partial(ours.run_engine, 1, STEPS),
            f"{STEPS} steps, without graphs": partial(launched.run_engine, 1, STEPS),
            f"calibrated, {CALIBRATED_STEPS} steps": partial(
                ours.run_options, method="calibrated", n_steps=CALIBRATED_STEPS
            ),
            "captum": partial(ours.run_captum, 1, STEPS),
            "captum, tuned": partial(ours.run_tuned, 1, STEPS),
        }
        seconds = medians(interleaved(runs, 1 if record.quick else 20, ("captum",)))
        record[f"one image, {precision}"] = {
            "max_rows": ours.engine.max_rows,
            "median_seconds": seconds,
            "times_captum": seconds["captum"] / seconds[f"{STEPS} steps"],
            "times_tuned": seconds["captum, tuned"] / seconds[f"{STEPS} steps"],
        }


def compare_batch(record: Record) -> None:
    """Explanations a second of a batch, by precision."""
    batch = 2 if record.quick else BATCH
    for precision in PRECISIONS:
        runs = {"batch": partial(contestants(precision, batch).run_engine, batch, STEPS)}
        seconds = medians(interleaved(runs, 1 if record.quick else 10))["batch"]
        record[f"batch of {batch}, {precision}"] = {"median_seconds": seconds, "per_second": batch / seconds}


def compare_errors(record: Record) -> None:
    """What each precision adds to float64 at the same nodes, beside the quadrature error; the gate is a third of it."""
    images, reference = (1, 64) if record.quick else (8, bench.REFERENCE_STEPS)
    for steps in (STEPS, 20):
        record[f"errors, {steps} steps"] = bench.compare_precisions(DEVICE, images, steps, reference)


def compare_rows(record: Record) -> None:
    """Median seconds of 100 steps by ``max_rows``."""
    sizes = (8, 64) if record.quick else bench.GPU_CHUNK_SIZES
    for precision in PRECISIONS[:2]:
        sized = {size: bench.Contestants(DEVICE, precision, 1, size) for size in sizes}
        runs = {str(size): partial(each.run_engine, 1, 100) for size, each in sized.items()}
        record[f"rows a pass, {precision}"] = medians(interleaved(runs, 1 if record.quick else 10))


def profile(record: Record) -> None:
    """Share of convolutions, and GFLOP/s that the engine achieves."""
    for precision in PRECISIONS[:2]:
        record[f"profile, {precision}"] = bench.profile_engine(contestants(precision, 2 if record.quick else BATCH))


def measure_first(record: Record) -> None:
    """Seconds of the first explanations after loading, which capture the graphs."""
    fresh = bench.Contestants(DEVICE, PRECISIONS[0], 1)
    record["first explanations, seconds"] = [
        timed(lambda: explain(fresh.engine, fresh.jobs((STEPS,)))) for _ in range(3)
    ]


MEASURES = {
    "rates": measure_rates,
    "one image": compare_single,
    "batch": compare_batch,
    "errors": compare_errors,
    "rows": compare_rows,
    "profile": profile,
    "first": measure_first,
}
