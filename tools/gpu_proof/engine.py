"""Speed of the engine by itself: precisions, CUDA graphs, rows a pass, batches, and errors of each precision."""

from __future__ import annotations

import copy
import time
from functools import cache, partial
from typing import Any

import torch
from attribution_engine import AttributionEngine
from engine_loading import PRECISIONS, allow_tf32

from tools.bench import engine as bench
from tools.evaluation.measuring import default_device, interleaved, medians, timed
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
def kept(precision: str, batch: int) -> bench.Contestants:
    return bench.Contestants(DEVICE, precision, batch)


def contestants(precision: str, quick: bool) -> bench.Contestants:
    """The implementations over a batch of images. From now on the process computes in this precision.

    Captum's process is one for all precisions, with PyTorch's defaults: its convolutions use TF32.
    """
    batch = 2 if quick else BATCH
    first, found = kept(PRECISIONS[0], batch), kept(precision, batch)
    found.captum, found.tuned_batch = first.captum, first.tuned_batch
    allow_tf32(precision)  # building another engine has set it for all
    return found


def graphs(engine: AttributionEngine) -> list[str]:
    """The row counts of an engine's CUDA graphs, so that figures show whether there were any."""
    return [f"{rows}{' paired' * paired}" for rows, paired in sorted(getattr(engine.passes, "_graphs", ()))]


def measure_first(record: Record) -> None:
    """Seconds of the first explanations of this process, which load libraries and capture the graphs."""
    fresh = contestants(PRECISIONS[0], record.quick)
    record["first explanations, seconds"] = [timed(partial(fresh.run_engine, 1, STEPS)) for _ in range(3)]


def compare_single(record: Record) -> None:
    """Median seconds of one image, by precision: with graphs, without, calibrated; and Captum's."""
    for precision in PRECISIONS:
        ours = contestants(precision, record.quick)
        if precision == PRECISIONS[0]:
            ours.tune()
        launched = copy.copy(ours)
        launched.engine = AttributionEngine(ours.engine.network, ours.engine.max_rows, density=ours.engine.density)
        runs = {
            f"{STEPS} steps": partial(ours.run_engine, 1, STEPS),
            f"{STEPS} steps, without graphs": partial(launched.run_engine, 1, STEPS),
            f"calibrated, {CALIBRATED_STEPS} steps": partial(
                ours.run_options, method="calibrated", n_steps=CALIBRATED_STEPS
            ),
            "captum": partial(ours.run_captum, 1, STEPS),
            "captum, tuned": partial(ours.run_tuned, 1, STEPS),
        }
        seconds = medians(interleaved(runs, 1 if record.quick else 15, ("captum",)))
        record[f"one image, {precision}"] = {
            "max_rows": ours.engine.max_rows,
            "graphs": graphs(ours.engine),
            "median_seconds": seconds,
            "times_captum": seconds["captum"] / seconds[f"{STEPS} steps"],
            "times_tuned": seconds["captum, tuned"] / seconds[f"{STEPS} steps"],
        }


def compare_batch(record: Record) -> None:
    """Explanations a second of a batch, by precision."""
    for precision in PRECISIONS:
        ours = contestants(precision, record.quick)
        batch = len(ours.images)
        seconds = medians(interleaved({"batch": partial(ours.run_engine, batch, STEPS)}, 1 if record.quick else 10))
        record[f"batch of {batch}, {precision}"] = {
            "graphs": graphs(ours.engine),
            "median_seconds": seconds["batch"],
            "per_second": batch / seconds["batch"],
        }


def profile(record: Record) -> None:
    """Share of convolutions, and GFLOP/s that the engine achieves."""
    for precision in PRECISIONS[:2]:
        record[f"profile, {precision}"] = bench.profile_engine(contestants(precision, record.quick))


def compare_rows(record: Record) -> None:
    """Median seconds of 100 steps by ``max_rows``."""
    sizes = (8, 64) if record.quick else bench.GPU_CHUNK_SIZES
    for precision in PRECISIONS[:2]:
        sized = {size: bench.Contestants(DEVICE, precision, 1, size) for size in sizes}
        runs = {str(size): partial(each.run_engine, 1, 100) for size, each in sized.items()}
        record[f"rows a pass, {precision}"] = medians(interleaved(runs, 1 if record.quick else 10))


def compare_errors(record: Record) -> None:
    """What each precision adds to float64 at the same nodes, beside the quadrature error; the gate is a third of it."""
    images, reference = (1, 64) if record.quick else (4, 512)
    for steps in (STEPS, 20):
        record[f"errors, {steps} steps"] = bench.compare_precisions(DEVICE, images, steps, reference)


MEASURES = {
    "rates": measure_rates,
    "first": measure_first,
    "one image": compare_single,
    "batch": compare_batch,
    "profile": profile,
    "rows": compare_rows,
    "errors": compare_errors,
}
