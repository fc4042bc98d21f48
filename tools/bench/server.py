"""``make bench-server``: the whole server against a FastAPI service around Captum, over the wire, on this machine.

Closed-loop clients request explanations of the same images with the same weights from both, in blocks that take turns:

FastAPI + Captum   `tools/bench/fastapi_peer.py`, 50 steps, JSON back.
explain            the ensemble over gRPC, also with attributions: at 50 steps, and about as accurate (``make quality``)
                   with 13 or 16 calibrated steps or a tolerance of 0.02. Then a tolerance of 0.05 with the heatmap
                   alone, the typical request.

For each number of clients: explanations a second, latencies, bytes on the wire, the servers' memory. Then latencies of
a prediction, and of a short explanation, beside many long ones. Prints tables, writes JSON.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import tritonclient.grpc
from torch import Tensor
from tqdm import tqdm

from tools.bench.load import Ask, image_tensor, jpeg_images, run_block, saturated, triton_asker
from tools.bench.processes import memory_sampler
from tools.evaluation.measuring import describe_machine, relative_distance, write_report
from tools.export import repository_with
from tools.paths import OUTPUTS, ROOT
from tools.server import EmbeddedServer, Ports
from tools.triton.options import LOCALHOST

N_STEPS = 50
PEER = f"FastAPI + Captum, {N_STEPS} steps"
# Requests of a contender before its first measured block.
WARM_UPS = 2
ATTRIBUTIONS, HEATMAP = ("PROBABILITIES", "ATTRIBUTIONS", "CONVERGENCE_DELTA"), ("PROBABILITIES", "HEATMAP")
CONTENDERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    f"explain, {N_STEPS} steps": (ATTRIBUTIONS, {"n_steps": N_STEPS}),
    # As accurate as the peer at the median (`measure_accuracy`), and more accurate.
    "explain, calibrated, 13 steps": (ATTRIBUTIONS, {"method": "calibrated", "n_steps": 13}),
    "explain, calibrated, 16 steps": (ATTRIBUTIONS, {"method": "calibrated", "n_steps": 16}),
    "explain, tolerance 0.02": (ATTRIBUTIONS, {"tolerance": "0.02"}),
    "explain, tolerance 0.05, heatmap": (HEATMAP, {"tolerance": "0.05"}),
}
# Number of clients -> rounds in which contenders take turns, more for the figures in the documents; else one.
ROUNDS = {8: 3, 32: 3}
# Reference for accuracy: its own error is within 2e-4, by the calibrated rule's error law.
REFERENCE = {"method": "calibrated", "n_steps": 160}
# Background load: clients and steps of their requests. There are fewer long ones, since the benchmark awaits their end.
SATURATING_CLIENTS, SATURATING_STEPS = 8, 200
LONG_CLIENTS, LONG_STEPS, SHORT_STEPS = 4, 500, 20


class PeerService:
    """The peer in its own process, with uvicorn's defaults."""

    def __init__(self) -> None:
        self.url = f"http://{LOCALHOST}:{Ports.free().http}"

    def __enter__(self) -> PeerService:
        command = [sys.executable, "-m", "uvicorn", "tools.bench.fastapi_peer:app", "--host", LOCALHOST]
        command += ["--port", self.url.rpartition(":")[2], "--log-level", "warning"]
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        with httpx.Client() as client:
            for _ in range(600):
                try:
                    client.get(f"{self.url}/docs")
                    return self
                except httpx.TransportError:
                    if self.process.poll() is not None:
                        break
                    time.sleep(0.1)
        self.__exit__()
        raise RuntimeError("the FastAPI service did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def asker(self, path: str, images: list[bytes]) -> Ask:
        client = httpx.Client(timeout=600)

        def ask(number: int) -> int:
            image = images[number % len(images)]
            answer = client.post(f"{self.url}/{path}", content=image)
            answer.raise_for_status()
            answer.json()  # a client needs the numbers, so parsing counts
            return len(image) + len(answer.content)

        return ask


def make_askers(
    service: PeerService,
    server: EmbeddedServer,
    images: list[bytes],
    contenders: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = CONTENDERS,
) -> dict[str, Callable[[], Ask]]:
    """By name, how a client of the peer or of a contender is made."""
    askers: dict[str, Callable[[], Ask]] = {PEER: lambda: service.asker("explain", images)}
    for name, (outputs, parameters) in contenders.items():
        askers[name] = partial(triton_asker, server.grpc_url, "explain", images, outputs, parameters)
    return askers


def measure_throughput(
    service: PeerService,
    server: EmbeddedServer,
    images: list[bytes],
    clients: list[int],
    seconds: float,
    contenders: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = CONTENDERS,
    rounds: Mapping[int, int] = ROUNDS,
) -> list[dict[str, Any]]:
    """A row for each contender, and the peer, and number of clients; they take turns, in ``rounds`` rounds."""
    askers = make_askers(service, server, images, contenders)
    pace = {}
    for name, make_asker in askers.items():
        run_block(make_asker, 1, WARM_UPS)
        pace[name] = run_block(make_asker, 1, WARM_UPS).elapsed / WARM_UPS
    turns = [(count, name) for count in clients for _ in range(rounds.get(count, 1)) for name in askers]
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for count, name in tqdm(turns, desc="clients x contenders"):
        process = service.process.pid if name == PEER else server.process.pid
        requests = max(2 * count, round(seconds / pace[name]))
        with memory_sampler(process) as memory:
            block = run_block(askers[name], count, requests)
        row = rows.setdefault(
            (count, name),
            {"contender": name, "clients": count, "requests": 0, "rates": [], "seconds": [], "memory_mb": 0.0},
        )
        row["requests"] += requests
        row["rates"].append(requests / block.elapsed)
        row["per_second"] = float(np.median(row["rates"]))
        row["seconds"] += block.seconds
        row["bytes"] = float(np.mean(block.sizes))
        row["memory_mb"] = max(row["memory_mb"], *memory.samples)
    return list(rows.values())


def measure_accuracy(service: PeerService, server: EmbeddedServer, images: list[bytes]) -> dict[str, list[float]]:
    """Relative L2 errors of each contender's attributions, one for each image."""
    errors: dict[str, list[float]] = {}
    with httpx.Client(timeout=600) as http, tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:

        def explain(image: bytes, parameters: dict[str, Any]) -> Tensor:
            outputs = [tritonclient.grpc.InferRequestedOutput("ATTRIBUTIONS")]
            answer = client.infer("explain", [image_tensor(image)], outputs=outputs, parameters=parameters)
            return torch.from_numpy(answer.as_numpy("ATTRIBUTIONS")[0].copy())

        for image in tqdm(images, desc="accuracy"):
            integral = explain(image, REFERENCE)
            answer = http.post(f"{service.url}/explain", content=image)
            answer.raise_for_status()
            answers = {PEER: torch.tensor(answer.json()["attributions"])}
            answers |= {name: explain(image, parameters) for name, (_, parameters) in CONTENDERS.items()}
            for name, attributions in answers.items():
                errors.setdefault(name, []).append(relative_distance(attributions, integral))
    return errors


def accuracy_table(accuracy: dict[str, list[float]]) -> str:
    """A Markdown table of the errors."""
    images = len(accuracy[PEER])
    lines = [
        f"Relative L2 distance of attributions from those of {REFERENCE['n_steps']} calibrated steps, {images} images:",
        "",
        "| | median | least to most |",
        "|---|---|---|",
    ]
    for name, errors in accuracy.items():
        lines.append(f"| {name} | {np.median(errors):.4f} | {min(errors):.4f} to {max(errors):.4f} |")
    return "\n".join(lines)


def measure_isolation(
    service: PeerService,
    server: EmbeddedServer,
    images: list[bytes],
    calls: int,
    seconds: float,
    saturating_steps: int = SATURATING_STEPS,
    long_steps: int = LONG_STEPS,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of up to ``calls`` calls, for at most ``seconds``, on an idle server and under a load of explanations."""
    url = server.grpc_url

    def explaining(outputs: tuple[str, ...], n_steps: int) -> Callable[[], Ask]:
        return lambda: triton_asker(url, "explain", images, outputs, {"n_steps": n_steps})

    contenders = {
        f"FastAPI + Captum, predictions; beside {SATURATING_CLIENTS} clients at 50 steps": (
            lambda: service.asker("classify", images),
            lambda: service.asker("explain", images),
            SATURATING_CLIENTS,
        ),
        f"classify; beside {SATURATING_CLIENTS} clients at {saturating_steps} steps": (
            lambda: triton_asker(url, "classify", images, ("PROBABILITIES",), {}),
            explaining(("SALIENCY",), saturating_steps),
            SATURATING_CLIENTS,
        ),
        f"explain, {SHORT_STEPS} steps; beside {LONG_CLIENTS} clients at {long_steps} steps": (
            explaining(HEATMAP, SHORT_STEPS),
            explaining(("SALIENCY",), long_steps),
            LONG_CLIENTS,
        ),
    }
    measured: dict[str, dict[str, list[float]]] = {}
    for name, (ask, beside, clients) in tqdm(contenders.items(), desc="isolation"):
        run_block(ask, 1, 3)
        idle = run_block(ask, 1, calls, seconds).seconds
        with saturated(beside, clients):
            loaded = run_block(ask, 1, calls, seconds).seconds
        measured[name] = {"idle": idle, "saturated": loaded}
    return measured


def times_peer(rows: list[dict[str, Any]]) -> list[float]:
    """Explanations a second of each row, as a multiple of the peer's with as many clients."""
    base = {row["clients"]: row["per_second"] for row in rows if row["contender"] == PEER}
    return [row["per_second"] / base[row["clients"]] for row in rows]


def throughput_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows."""
    lines = [
        "| clients | | explanations a second | times the peer | p50 | p95 | p99 | bytes | server memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, times in zip(rows, times_peer(rows)):
        p50, p95, p99 = (f"{1e3 * np.percentile(row['seconds'], part):.0f} ms" for part in (50, 95, 99))
        rates = row["rates"]
        spread = f" ({min(rates):.2f} to {max(rates):.2f})" if len(rates) > 1 else ""
        lines.append(
            f"| {row['clients']} | {row['contender']} | {row['per_second']:.2f}{spread} "
            f"| {times:.2f} | {p50} | {p95} | {p99} "
            f"| {row['bytes'] / 1e3:.0f} KB | {row['memory_mb']:.0f} MB |"
        )
    return "\n".join(lines)


def isolation_table(isolation: dict[str, dict[str, list[float]]]) -> str:
    """A Markdown table of latencies, idle and under load."""
    lines = [
        "| calls; what runs beside them | idle p50 / p95 / p99 | beside it | p95, times idle |",
        "|---|---|---|---|",
    ]
    for name, seconds in isolation.items():
        cells = [
            " / ".join(f"{1e3 * np.percentile(values, part):.0f}" for part in (50, 95, 99)) + " ms"
            for values in seconds.values()
        ]
        ratio = np.percentile(seconds["saturated"], 95) / np.percentile(seconds["idle"], 95)
        calls = " and ".join(str(len(values)) for values in seconds.values())
        lines.append(f"| {name}, {calls} calls | {cells[0]} | {cells[1]} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.server", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=30, help="of each block, about (default: 30)")
    parser.add_argument("--calls", type=int, default=100, help="predictions in each condition (default: 100)")
    parser.add_argument("--quick", action="store_true", help="two numbers of clients, short blocks")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "server.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clients, arguments.seconds, arguments.calls = [1, 8], 8, 40
    repository = repository_with("shapes")
    images = jpeg_images()
    log = OUTPUTS / "bench" / "triton.log"
    with PeerService() as service, EmbeddedServer(repository, Ports.free(), log_file=log) as server:
        report: dict[str, Any] = {
            "command": " ".join(["python -m tools.bench.server", *sys.argv[1:]]),
            "machine": describe_machine(),
            "throughput": measure_throughput(service, server, images, arguments.clients, arguments.seconds),
            "accuracy": measure_accuracy(service, server, images),
            "isolation": measure_isolation(service, server, images, arguments.calls, arguments.seconds),
        }
    tables = [
        throughput_table(report["throughput"]),
        accuracy_table(report["accuracy"]),
        isolation_table(report["isolation"]),
    ]
    write_report(report, "\n\n".join(tables), arguments.out)


if __name__ == "__main__":
    main()
