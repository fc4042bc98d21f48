"""Measures the models with perf_analyzer: closed loops and rates, with and without shared memory."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import tritonclient.grpc
from tqdm import tqdm

from tools.bench.perf import read_profile, run
from tools.server import EmbeddedServer
from tools.triton.options import ADMIN_HEADER

MODELS = ("preprocess", "classifier", "integrated_gradients", "heatmap")
N_STEPS = 20
WINDOW = ["--measurement-mode", "count_windows", "--stability-percentage", "50", "--max-trials", "5"]


def measure(server: EmbeddedServer, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """An entry for each run: its options, results from the CSV and the profile, and the models' mean batches."""
    steps = ["--request-parameter", f"n_steps:{N_STEPS}:int"]
    often, seldom = (["--measurement-request-count", count] for count in ("30", "6"))
    tolerance = ["--request-parameter", "tolerance:0.05:string"]
    # Registering shared memory requires the operator's key.
    key = server.grpc_admin_headers[f"triton-grpc-protocol-{ADMIN_HEADER}"]
    shared = ["--shared-memory", "system", "--output-shared-memory-size", "1000000"]
    secret = ["-H", f"triton-grpc-protocol-{ADMIN_HEADER}:{key}"]
    runs = [
        ("classify", "closed loop", [*often, "--concurrency-range", "1:7:3"]),
        ("classify", "closed loop, shared memory", [*shared, *secret, *often, "--concurrency-range", "1:7:3"]),
        ("classify", "rate", [*often, "--request-rate-range", "5:15:5"]),
        # perf_analyzer cannot share memory with models that have optional inputs.
        ("explain", "closed loop", [*seldom, *steps, "--concurrency-range", "1:4:3"]),
        ("explain", "rate", [*seldom, *steps, "--request-rate-range", "0.5:1:0.5"]),
        ("explain_stream", "closed loop", [*seldom, *tolerance, "--concurrency-range", "1:4:3"]),
    ]
    if quick:
        runs = [("classify", "closed loop", [*often, "--concurrency-range", "1"])]
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    entries = []
    for model, kind, options in tqdm(runs, desc="perf_analyzer"):
        run_folder = folder / f"{model}-{kind.replace(', ', '-').replace(' ', '-')}"
        before = _batches(client)
        answer = run(model, server.grpc_url, [*WINDOW, *options], run_folder, quiet=True)
        if answer.returncode != 0:
            raise RuntimeError(f"perf_analyzer of {model}, {kind}, failed:\n{answer.stdout}\n{answer.stderr}")
        with (run_folder / f"{model}.csv").open() as file:
            rows = list(csv.DictReader(file))
        rows.sort(key=lambda row: float(next(iter(row.values()))))
        # For other models the export contains all outputs and is cut off at the first NaN.
        profile = read_profile(run_folder / f"{model}.json") if model == "explain_stream" else []
        first = {float(load["load"]["value"]): load["first_ms"] for load in profile}
        after = _batches(client)
        entries.append(
            {
                "model": model,
                "kind": kind,
                "options": [option for option in options if option not in secret],
                "loads": [_load(row, first) for row in rows],
                "mean_batch": {
                    name: (after[name][0] - before[name][0]) / (after[name][1] - before[name][1])
                    for name in MODELS
                    if after[name][1] > before[name][1]
                },
            }
        )
    return entries


def _load(row: dict[str, str], first: dict[float, list[float]]) -> dict[str, Any]:
    """Results for one load from the CSV, and p50, p95 and p99 of first responses, in ms."""
    load = float(next(iter(row.values())))
    return {
        "load": load,
        "per_second": float(row["Inferences/Second"]),
        "ms": [float(row[f"p{part} latency"]) / 1e3 for part in (50, 95, 99)],
        "server_ms": {name: float(row[f"Server {name}"]) / 1e3 for name in ("Queue", "Compute Infer")},
        "first_ms": first.get(load),
    }


def _batches(client: tritonclient.grpc.InferenceServerClient) -> dict[str, tuple[int, int]]:
    """Images and executions of each model so far."""
    counts = {}
    for name in MODELS:
        statistics = client.get_inference_statistics(name).model_stats[0]
        counts[name] = (statistics.inference_count, statistics.execution_count)
    return counts


def table(entries: list[dict[str, Any]]) -> str:
    """A Markdown table of the runs."""
    lines = [
        "| model | | load | requests a second | p50 | p95 | p99 | queue | compute | mean batches |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        batches = ", ".join(f"{name} {size:.1f}" for name, size in entry["mean_batch"].items())
        for load in entry["loads"]:
            p50, p95, p99 = (f"{value:.0f} ms" for value in load["ms"])
            queue, compute = (f"{value:.1f} ms" for value in load["server_ms"].values())
            lines.append(
                f"| {entry['model']} | {entry['kind']} | {load['load']:g} | {load['per_second']:.2f} "
                f"| {p50} | {p95} | {p99} | {queue} | {compute} | {batches} |"
            )
            if load["first_ms"]:
                p50, p95, p99 = (f"{value:.0f} ms" for value in load["first_ms"])
                lines.append(f"| | first response | | | {p50} | {p95} | {p99} | | | |")
    lines += [
        "",
        "Queue and compute as Triton counts them; `integrated_gradients` is counted up to `hold_seconds` a request, "
        "answered or not, so those of `explain` are not the whole.",
    ]
    return "\n".join(lines)
