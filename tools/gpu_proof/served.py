"""The whole server, from JPEG to heatmap, against the FastAPI peer on the same device."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tools.bench import perf
from tools.bench import server as bench
from tools.bench.load import jpeg_images
from tools.evaluation.measuring import distribution
from tools.export import repository_with
from tools.gpu_proof.part import Record
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports

CLIENTS = (1, 8, 32, 64)
CONTENDERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "explain, 50 steps, heatmap": (bench.HEATMAP, {"n_steps": 50}),
    "explain, 50 steps, attributions": (bench.ATTRIBUTIONS, {"n_steps": 50}),
    "explain, calibrated, 16 steps, heatmap": (bench.HEATMAP, {"method": "calibrated", "n_steps": 16}),
}


@contextmanager
def running() -> Iterator[EmbeddedServer]:
    log = OUTPUTS / "gpu_proof" / "served.log"
    with EmbeddedServer(repository_with("shapes"), Ports.free(), log_file=log) as server:
        yield server


def measure(record: Record) -> None:
    images = jpeg_images()
    seconds = 1.0 if record.quick else 4.0
    with bench.PeerService() as service, running() as server:
        for clients in CLIENTS[:1] if record.quick else CLIENTS:
            rows = bench.measure_throughput(service, server, images, [clients], seconds, CONTENDERS, {})
            for row, times in zip(rows, bench.times_peer(rows)):
                row["seconds"] = distribution(row["seconds"])
                row["times_peer"] = times
            record[f"{clients} clients"] = rows
        calls, steps = (3, 20) if record.quick else (300, bench.SATURATING_STEPS)
        isolation = bench.measure_isolation(service, server, images, calls, seconds, steps, 2 * steps)
        record["isolation"] = {
            name: {when: distribution(values) for when, values in both.items()} for name, both in isolation.items()
        }
        for name, both in isolation.items():
            record[f"p99, times idle: {name}"] = np.percentile(both["saturated"], 99) / np.percentile(both["idle"], 99)
        with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        record["GPU metrics"] = [line for line in lines if line.startswith("nv_gpu")]


def measure_with_perf_analyzer(record: Record) -> None:
    count = "5" if record.quick else "100"
    options = ["--measurement-mode", "count_windows", "--measurement-request-count", count, "--max-trials", "3"]
    options += ["--stability-percentage", "50"]
    with running() as server:
        for model, more in (
            ("classify", ["--concurrency-range", "1:1" if record.quick else "1:33:16"]),
            (
                "explain",
                ["--request-parameter", "n_steps:50:int", "--concurrency-range", "1:1" if record.quick else "1:33:16"],
            ),
        ):
            folder = OUTPUTS / "gpu_proof" / "perf"
            answer = perf.run(model, server.grpc_url, [*options, *more], folder, quiet=True)
            table = folder / f"{model}.csv"
            record[f"perf_analyzer, {model}"] = {
                "code": answer.returncode,
                "csv": table.read_text().splitlines()
                if table.is_file()
                else answer.stdout[-1000:] + answer.stderr[-1000:],
            }


MEASURES = {"measure": measure, "perf_analyzer": measure_with_perf_analyzer}
