"""The whole server, from JPEG to heatmap, against the FastAPI peer on the same device."""

from __future__ import annotations

import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench import perf
from tools.bench import server as bench
from tools.bench.load import jpeg_images, run_block
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
FOLDER = OUTPUTS / "gpu_proof"
STOP_SECONDS = 3  # the requests are this program's own


def measure(record: Record) -> None:
    images = jpeg_images()
    with EmbeddedServer(
        repository_with("shapes"), Ports.free(), log_file=FOLDER / "served.log", stop_seconds=STOP_SECONDS
    ) as server:
        with bench.PeerService() as service:
            for clients in CLIENTS[:1] if record.quick else CLIENTS:
                record.attempt(f"{clients} clients", partial(measure_clients, record, service, server, images, clients))
            record.attempt("isolation", partial(measure_isolation, record, service, server, images))
        record.attempt("GPU metrics", partial(read_gpu_metrics, record, server))
        for model, options in (("explain", ["--request-parameter", "n_steps:50:int"]), ("classify", [])):
            record.attempt("perf_analyzer", partial(measure_with_perf_analyzer, record, server, model, options))


def measure_clients(
    record: Record, service: bench.PeerService, server: EmbeddedServer, images: list[bytes], clients: int
) -> None:
    """Explanations a second, and latencies, of the peer and of each contender."""
    for ask in bench.make_askers(service, server, images, CONTENDERS).values():
        run_block(ask, clients, clients)  # batches of this size are compiled and captured before they are timed
    seconds = 1.0 if record.quick else 3.0
    rows = bench.measure_throughput(service, server, images, [clients], seconds, CONTENDERS, {})
    for row, times in zip(rows, bench.times_peer(rows)):
        row["seconds"] = distribution(row["seconds"])
        row["times_peer"] = times
    record[f"{clients} clients"] = rows


def measure_isolation(record: Record, service: bench.PeerService, server: EmbeddedServer, images: list[bytes]) -> None:
    """Predictions, and short explanations, beside many long ones."""
    calls, seconds, steps = (3, 1.0, 20) if record.quick else (300, 3.0, bench.SATURATING_STEPS)
    isolation = bench.measure_isolation(service, server, images, calls, seconds, steps, 2 * steps)
    record["isolation"] = {
        name: {
            **{when: distribution(values) for when, values in both.items()},
            "p99, times idle": np.percentile(both["saturated"], 99) / np.percentile(both["idle"], 99),
        }
        for name, both in isolation.items()
    }


def read_gpu_metrics(record: Record, server: EmbeddedServer) -> None:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    record["GPU metrics"] = [line for line in lines if line.startswith("nv_gpu")]


def measure_with_perf_analyzer(record: Record, server: EmbeddedServer, model: str, options: list[str]) -> None:
    count, levels = ("5", "1:1") if record.quick else ("100", "1:33:16")
    options = ["--measurement-mode", "count_windows", "--measurement-request-count", count, *options]
    options += ["--max-trials", "3", "--stability-percentage", "50", "--concurrency-range", levels]
    table: Path = FOLDER / "perf" / f"{model}.csv"
    table.unlink(missing_ok=True)
    answer = perf.run(model, server.grpc_url, options, table.parent, quiet=True)
    said = answer.stdout[-1000:] + answer.stderr[-1000:]
    record[f"perf_analyzer, {model}"] = {
        "code": answer.returncode,
        "csv": table.read_text().splitlines() if table.is_file() else said,
    }


MEASURES = {"served": measure}
