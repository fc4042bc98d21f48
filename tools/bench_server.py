"""``make bench-server``: the whole server against a FastAPI service around Captum, over the wire, on this machine.

Closed-loop clients ask both for explanations of the same images by the same weights, in blocks that take turns:

FastAPI + Captum   `tools/baseline/service.py`, 50 steps, JSON back.
explain            the ensemble over gRPC at 50 steps, and at about as accurate ones (``make quality``): 16 calibrated
                   steps, and a tolerance of 0.02. Wanted are the attributions, as there. Then what most would ask
                   for: a tolerance of 0.05 and the heatmap alone.

For each number of clients: explanations a second, latencies, bytes on the wire, the servers' memory. Then what a
prediction waits for beside saturated explanations, and where an explanation's time goes. Prints tables, writes JSON.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import tritonclient.grpc
from tqdm import tqdm

from tools.export import ensure_exported
from tools.load import Ask, jpeg_images, run_block, saturated, triton_asker
from tools.measuring import describe_machine, write_report
from tools.paths import OUTPUTS, ROOT
from tools.server import HOST, EmbeddedServer, Ports

BASELINE = "FastAPI + Captum, 50 steps"
# Requests of the first block of a contender serve as warm-up.
WARM_UPS = 2
ATTRIBUTIONS, HEATMAP = ("PROBABILITIES", "ATTRIBUTIONS", "CONVERGENCE_DELTA"), ("PROBABILITIES", "HEATMAP")
CONTENDERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "explain, 50 steps": (ATTRIBUTIONS, {"n_steps": 50}),
    "explain, calibrated, 16 steps": (ATTRIBUTIONS, {"method": "calibrated", "n_steps": 16}),
    "explain, tolerance 0.02": (ATTRIBUTIONS, {"tolerance": "0.02"}),
    "explain, tolerance 0.05, heatmap": (HEATMAP, {"tolerance": "0.05"}),
}
MODELS = ("preprocess", "classifier", "integrated_gradients", "heatmap")
# What saturates: clients and the steps of each of their requests.
SATURATING_CLIENTS, SATURATING_STEPS = 8, 200


class BaselineService:
    """The peer in a process of its own, with uvicorn's defaults."""

    def __init__(self) -> None:
        self.url = f"http://{HOST}:{Ports.free().http}"

    def __enter__(self) -> BaselineService:
        command = [sys.executable, "-m", "uvicorn", "tools.baseline.service:app", "--host", HOST]
        command += ["--port", self.url.rpartition(":")[2], "--log-level", "warning"]
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        with httpx.Client() as client:
            for _ in range(600):
                try:
                    client.get(f"{self.url}/docs")
                    return self
                except httpx.TransportError:
                    time.sleep(0.1)
        raise RuntimeError("the baseline service did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def asker(self, path: str, images: list[bytes]) -> Ask:
        client = httpx.Client(timeout=600)

        def ask(number: int) -> int:
            image = images[number % len(images)]
            answer = client.post(f"{self.url}/{path}", content=image)
            answer.raise_for_status()
            answer.json()  # what came is of use only as numbers
            return len(image) + len(answer.content)

        return ask


class MemoryWatch:
    """The most memory of their own that a process and its descendants have had at once, sampled.

    Without files that are mapped, and read from where the kernel keeps it counted: to add up shares of pages would take
    a tenth of the machine.
    """

    def __init__(self, process: int) -> None:
        self._process, self.peak_mb = process, 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.5):
            self.peak_mb = max(self.peak_mb, sum(map(_own_mb, _session(self._process))))


def _session(leader: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[3]) == leader:
                yield int(folder.name)
        except (OSError, ValueError):
            continue  # it ended meanwhile


def _own_mb(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1e3


def measure_throughput(
    service: BaselineService, server: EmbeddedServer, images: list[bytes], clients: list[int], seconds: float
) -> list[dict[str, Any]]:
    """A row for each contender and number of clients; contenders take turns."""
    askers: dict[str, Callable[[], Ask]] = {BASELINE: lambda: service.asker("explain", images)}
    for name, (outputs, parameters) in CONTENDERS.items():
        askers[name] = lambda outputs=outputs, parameters=parameters: triton_asker(
            server.grpc_url, "explain", images, outputs, parameters
        )
    pace = {}
    for name, make_asker in askers.items():
        run_block(make_asker, 1, WARM_UPS)
        pace[name] = run_block(make_asker, 1, WARM_UPS).elapsed / WARM_UPS
    rows = []
    cells = [(count, name) for count in clients for name in askers]
    for count, name in tqdm(cells, desc="clients x contenders"):
        process = service.process.pid if name == BASELINE else server.process.pid
        requests = max(2 * count, round(seconds / pace[name]))
        with MemoryWatch(process) as memory:
            block = run_block(askers[name], count, requests)
        rows.append(
            {
                "contender": name,
                "clients": count,
                "requests": requests,
                "per_second": requests / block.elapsed,
                "seconds": block.seconds,
                "bytes": float(np.mean(block.sizes)),
                "memory_mb": memory.peak_mb,
            }
        )
    return rows


def measure_isolation(
    service: BaselineService, server: EmbeddedServer, images: list[bytes], calls: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Seconds of so many predictions with nobody else there, and beside saturated explanations; fewer in time."""
    url = server.grpc_url
    contenders = {
        "FastAPI + Captum": (
            lambda: service.asker("classify", images),
            lambda: service.asker("explain", images),
        ),
        "classify": (
            lambda: triton_asker(url, "classify", images, ("PROBABILITIES",), {}),
            lambda: triton_asker(url, "explain", images, ("SALIENCY",), {"n_steps": SATURATING_STEPS}),
        ),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, (classify, explain) in contenders.items():
        run_block(classify, 1, 5)
        idle = run_block(classify, 1, calls, seconds).seconds
        with saturated(explain, SATURATING_CLIENTS):
            beside = run_block(classify, 1, calls, seconds).seconds
        found[name] = {"idle": idle, "saturated": beside}
    return found


def measure_shares(server: EmbeddedServer, images: list[bytes], calls: int) -> dict[str, Any]:
    """Where an explanation's time goes with one client, by Triton's own statistics: means in ms."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    ask = triton_asker(server.grpc_url, "explain", images, HEATMAP, {"n_steps": 20})
    for number in range(3):
        ask(number)
    before = {model: _statistics(client, model) for model in MODELS}
    seconds = run_block(lambda: ask, 1, calls).seconds
    after = {model: _statistics(client, model) for model in MODELS}
    shares = {
        model: {part: (after[model][part] - before[model][part]) / calls / 1e6 for part in after[model]}
        for model in MODELS
    }
    total = 1e3 * float(np.mean(seconds))
    return {
        "models": shares,
        "total_ms": total,
        "outside_gradients_ms": total - shares["integrated_gradients"]["compute_infer"],
    }


def _statistics(client: tritonclient.grpc.InferenceServerClient, model: str) -> dict[str, int]:
    """Nanoseconds so far."""
    found = client.get_inference_statistics(model).model_stats[0].inference_stats
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    return {part: getattr(found, part).ns for part in parts}


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    base = {row["clients"]: row for row in report["throughput"] if row["contender"] == BASELINE}
    lines = [
        "| clients | | explanations a second | times the baseline | p50 | p95 | p99 | bytes | server memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["throughput"]:
        p50, p95, p99 = (f"{1e3 * np.percentile(row['seconds'], part):.0f} ms" for part in (50, 95, 99))
        lines.append(
            f"| {row['clients']} | {row['contender']} | {row['per_second']:.2f} "
            f"| {row['per_second'] / base[row['clients']]['per_second']:.2f} | {p50} | {p95} | {p99} "
            f"| {row['bytes'] / 1e3:.0f} KB | {row['memory_mb']:.0f} MB |"
        )
    lines += [
        "",
        f"| predictions | idle p50 / p95 / p99 | beside {SATURATING_CLIENTS} clients' explanations | p95, times idle |",
        "|---|---|---|---|",
    ]
    for name, found in report["isolation"].items():
        cells = [
            " / ".join(f"{1e3 * np.percentile(values, part):.0f}" for part in (50, 95, 99)) + " ms"
            for values in found.values()
        ]
        ratio = np.percentile(found["saturated"], 95) / np.percentile(found["idle"], 95)
        calls = " and ".join(str(len(values)) for values in found.values())
        lines.append(f"| {name}, {calls} calls | {cells[0]} | {cells[1]} | {ratio:.2f} |")
    lines += [
        "",
        "| one explanation of 20 steps, heatmap | queue | input | compute | output |",
        "|---|---|---|---|---|",
    ]
    for model, parts in report["shares"]["models"].items():
        lines.append(f"| {model} | {' | '.join(f'{value:.1f} ms' for value in parts.values())} |")
    shares = report["shares"]
    lines.append(
        f"\n{shares['total_ms']:.0f} ms in all, {shares['outside_gradients_ms']:.1f} ms of them outside the gradients."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_server", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=30, help="of each block, about (default: 30)")
    parser.add_argument("--calls", type=int, default=100, help="predictions in each condition (default: 100)")
    parser.add_argument("--quick", action="store_true", help="two numbers of clients, short blocks")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "server.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clients, arguments.seconds, arguments.calls = [1, 8], 8, 40
    ensure_exported()
    images = jpeg_images()
    log = OUTPUTS / "bench" / "triton.log"
    with BaselineService() as service, EmbeddedServer(ports=Ports.free(), log_file=log) as server:
        report = {
            "command": " ".join(["python -m tools.bench_server", *sys.argv[1:]]),
            "machine": describe_machine(torch.device("cpu")),
            "throughput": measure_throughput(service, server, images, arguments.clients, arguments.seconds),
            "isolation": measure_isolation(service, server, images, arguments.calls, arguments.seconds),
            "shares": measure_shares(server, images, 30),
        }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
