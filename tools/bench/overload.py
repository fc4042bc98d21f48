"""Answers and refusals at 1, 2, 5 and 10 times the server's capacity: ``python -m tools.bench.overload``.

Requests for explanations are sent at a fixed rate, in an open loop; one client sends `classify` at intervals beside
them. The server has a shorter `max_wait_seconds` than the default. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
from tqdm import tqdm

from tools.bench.load import image_tensor, jpeg_images, run_block, triton_asker
from tools.bench.processes import memory_sampler
from tools.bench.scaling import settled_metrics
from tools.evaluation.measuring import describe_machine, distribution, write_report
from tools.export import repository_with
from tools.paths import OUTPUTS
from tools.probe import total
from tools.server import EmbeddedServer, Ports
from tools.triton.config_shapes import write_settings

N_STEPS = 20
FACTORS = (1, 2, 5, 10)
MAX_WAIT_SECONDS = 5.0
CLASSIFY_EVERY = 0.5
# Requests that measure the capacity, before and after each factor, because a machine's speed changes.
CAPACITY_REQUESTS = 24


def with_settings(folder: Path, model: str, **settings: Any) -> Path:
    """A model repository with the network of drawn shapes and other values for some parameters of a model."""
    repository = folder / "model_repository"
    known = repository_with("shapes")
    shutil.copytree(known, repository, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    write_settings(repository / model / "config.pbtxt", **settings)
    return repository


@dataclass
class Outcomes:
    """Outcomes of the requests of an open loop."""

    offered: int = 0
    accepted: list[float] = field(default_factory=list)  # seconds
    refused: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    elapsed: float = 0.0


def open_loop(url: str, images: list[bytes], rate: float, seconds: float, parameters: dict[str, Any]) -> Outcomes:
    """Send requests for explanations at a rate, and wait for all answers."""
    client = tritonclient.grpc.InferenceServerClient(url)
    inputs = [image_tensor(image) for image in images]
    outputs = [tritonclient.grpc.InferRequestedOutput("SALIENCY")]
    outcomes, done = Outcomes(), threading.Semaphore(0)

    def finish(started: float, result: Any, error: Any) -> None:
        seconds = time.perf_counter() - started
        if error is None:
            outcomes.accepted.append(seconds)
        else:
            outcomes.refused.append(seconds)
            message = re.sub(r"[\d.]+", "N", error.message())
            outcomes.errors[f"{str(error.status()).removeprefix('StatusCode.')} {message}"] += 1
        done.release()

    started = time.perf_counter()
    while (now := time.perf_counter()) < started + seconds:
        client.async_infer(
            "explain",
            [inputs[outcomes.offered % len(inputs)]],
            lambda result, error, now=now: finish(now, result, error),
            outputs=outputs,
            parameters=parameters,
        )
        outcomes.offered += 1
        time.sleep(max(0.0, started + outcomes.offered / rate - time.perf_counter()))
    for _ in range(outcomes.offered):
        done.acquire()
    outcomes.elapsed = time.perf_counter() - started
    return outcomes


def computing(server: EmbeddedServer) -> tuple[Counter[float], float]:
    """The server's histogram of compute times: cumulative counts by upper bound, and the sum in seconds."""
    series = settled_metrics(server)
    ends: Counter[float] = Counter()
    for name, labels, value in series:
        if name == "integrated_gradients_compute_seconds_bucket":
            ends[float(re.findall('le="([^"]+)"', labels)[0])] += round(value)
    return ends, total(series, "integrated_gradients_compute_seconds_sum")


def measure(server: EmbeddedServer, factors: tuple[float, ...], seconds: float) -> dict[str, Any]:
    """Seconds of predictions on an idle server, and a row for each factor of the capacity."""
    images, url = jpeg_images(), server.grpc_url
    parameters = {"n_steps": N_STEPS}
    explaining = lambda: triton_asker(url, "explain", images, ("SALIENCY",), parameters)  # noqa: E731
    classify = triton_asker(url, "classify", images, ("PROBABILITIES",), {})

    def capacity() -> float:
        block = run_block(explaining, 4, CAPACITY_REQUESTS)
        return len(block.seconds) / block.elapsed

    run_block(explaining, 4, 8)
    capacity_before = capacity()
    for number in range(5):
        classify(number)
    idle = run_block(lambda: classify, 1, 40).seconds
    rows = []
    for factor in tqdm(factors, desc="times capacity"):
        predictions: list[float] = []
        failures: list[Exception] = []
        is_over = threading.Event()

        def predict(predictions: list[float], failures: list[Exception], is_over: threading.Event) -> None:
            while not is_over.wait(CLASSIFY_EVERY):
                started = time.perf_counter()
                try:
                    classify(len(predictions))
                    predictions.append(time.perf_counter() - started)
                except Exception as failure:
                    failures.append(failure)

        thread = threading.Thread(target=predict, args=(predictions, failures, is_over))
        thread.start()
        ends_before, seconds_before = computing(server)
        with memory_sampler(server.process.pid) as memory:
            outcomes = open_loop(url, images, factor * capacity_before, seconds, parameters)
        ends, computed = computing(server)
        ends.subtract(ends_before)
        is_over.set()
        thread.join()
        capacity_after = capacity()
        rows.append(
            {
                "factor": factor,
                "capacity": (capacity_before + capacity_after) / 2,
                "offered": outcomes.offered,
                "accepted_seconds": distribution(outcomes.accepted),
                "refused_seconds": distribution(outcomes.refused),
                "errors": dict(outcomes.errors),
                "computing_mean_seconds": (computed - seconds_before) / max(1, ends[np.inf]),
                "computing_p99_at_most": min(end for end, count in ends.items() if count >= 0.99 * ends[np.inf]),
                "accepted_per_second": len(outcomes.accepted) / outcomes.elapsed,
                "classify_seconds": distribution(predictions),
                "classify_failures": len(failures),
                "memory_mb": max(memory.samples),
            }
        )
        capacity_before = capacity_after
    return {"classify_idle_seconds": distribution(idle), "rows": rows}


def table(report: dict[str, Any]) -> str:
    """A Markdown table of the rows, and the error messages."""
    idle = 1e3 * report["classify_idle_seconds"]["p95"]
    lines = [
        f"Capacity in explanations of {N_STEPS} steps a second, mean of before and after; `classify` idle p95 "
        f"{idle:.0f} ms; `max_wait_seconds` {report['max_wait_seconds']:g}.",
        "",
        "| times | capacity | offered | answered, a second | of capacity | p50 | p99 | of it computing, mean | p99 "
        "| refused | refused within, p95 | classify p50, p95 | times idle | failed | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        accepted, refused, classify = (row[f"{name}_seconds"] for name in ("accepted", "refused", "classify"))
        within = f"{1e3 * refused['p95']:.0f} ms" if refused["count"] else ""
        low, high = 1e3 * classify["p50"], 1e3 * classify["p95"]
        lines.append(
            f"| {row['factor']:g} | {row['capacity']:.2f} | {row['offered']} | {row['accepted_per_second']:.2f} "
            f"| {row['accepted_per_second'] / row['capacity']:.1%} | {accepted['p50']:.1f} s | {accepted['p99']:.1f} s "
            f"| {row['computing_mean_seconds']:.1f} s | at most {row['computing_p99_at_most']:g} s "
            f"| {refused['count'] / row['offered']:.0%} | {within} | {low:.0f}, {high:.0f} ms "
            f"| {high / idle:.1f} | {row['classify_failures']} | {row['memory_mb']:.0f} MB |"
        )
    errors: Counter[str] = Counter()
    for row in report["rows"]:
        errors.update(row["errors"])
    lines += ["", *(f"- {count} x {message}" for message, count in errors.most_common())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.overload", description=__doc__.splitlines()[0])
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS))
    parser.add_argument("--seconds", type=float, default=60, help="of each factor (default: 60)")
    parser.add_argument("--max-wait-seconds", type=float, default=MAX_WAIT_SECONDS)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "overload.json")
    arguments = parser.parse_args()
    folder = OUTPUTS / "bench" / "overload"
    repository = with_settings(folder, "integrated_gradients", max_wait_seconds=arguments.max_wait_seconds)
    with EmbeddedServer(repository, Ports.free(), log_file=folder / "triton.log") as server:
        measured = measure(server, tuple(arguments.factors), arguments.seconds)
    report = {
        "command": " ".join(["python -m tools.bench.overload", *sys.argv[1:]]),
        "machine": describe_machine(),
        "max_wait_seconds": arguments.max_wait_seconds,
        **measured,
    }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
