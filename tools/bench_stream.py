"""``make bench-stream``: when the first response of `explain_stream` comes while others' gradients fill the machine.

On a real server, blocks of streams alternate: with nobody else there, and while closed-loop clients ask `explain` for
many steps each. Each stream is read to its prediction and then cancelled; `classify` is asked beside it. Prints
medians and their ratios and writes JSON.
"""

from __future__ import annotations

import argparse
import io
import queue
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.grpc
from PIL import Image

from tools.export import ensure_exported
from tools.measuring import describe_machine, timed, write_report
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports
from tools.shapes.dataset import draw_scene

CALLS = ("classify", "first response of a stream")


class Caller:
    """A client that asks about one image."""

    def __init__(self, url: str, image: bytes) -> None:
        self.client = tritonclient.grpc.InferenceServerClient(url)
        self.input = tritonclient.grpc.InferInput("IMAGE", [1, 1], "BYTES")
        self.input.set_data_from_numpy(np.array([[image]], np.object_))

    def classify(self) -> None:
        self.client.infer("classify", [self.input]).as_numpy("PROBABILITIES")

    def explain(self, n_steps: int) -> None:
        wanted = [tritonclient.grpc.InferRequestedOutput("SALIENCY")]
        self.client.infer("explain", [self.input], outputs=wanted, parameters={"n_steps": n_steps})

    def first_response(self) -> float:
        """Seconds from asking to the prediction; the rest of the stream is cancelled."""
        responses: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        self.client.start_stream(callback=lambda result, error: responses.put((result, error)))
        started = time.perf_counter()
        self.client.async_stream_infer("explain_stream", [self.input])
        result, error = responses.get(timeout=120)
        seconds = time.perf_counter() - started
        if error is not None:
            raise error
        result.as_numpy("PROBABILITIES")
        self.client.stop_stream(cancel_requests=True)
        return seconds


@contextmanager
def saturated(url: str, image: bytes, clients: int, n_steps: int) -> Iterator[None]:
    """Clients that ask for explanations without a pause, each the next as soon as it has one."""
    is_over = threading.Event()
    failures: list[Exception] = []

    def ask() -> None:
        caller = Caller(url, image)
        try:
            while not is_over.is_set():
                caller.explain(n_steps)
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(3)  # all of them are waiting for gradients now
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def measure(server: EmbeddedServer, clients: int, n_steps: int, blocks: int, calls: int) -> dict[str, Any]:
    """Seconds of each call in either condition."""
    file = io.BytesIO()
    Image.fromarray(draw_scene("test", 0, size=256).image).save(file, "PNG")
    image = file.getvalue()
    caller = Caller(server.grpc_url, image)
    seconds: dict[str, dict[str, list[float]]] = {call: {"idle": [], "saturated": []} for call in CALLS}

    def block(condition: str) -> None:
        for _ in range(calls):
            seconds[CALLS[0]][condition].append(timed(caller.classify))
            seconds[CALLS[1]][condition].append(caller.first_response())
            time.sleep(0.3)  # what was under way when it was cancelled comes to its end

    for _ in range(3):
        caller.classify()
        caller.first_response()
    for _ in range(blocks):
        block("idle")
        with saturated(server.grpc_url, image, clients, n_steps):
            block("saturated")
    return seconds


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    load = f"{report['clients']} clients x {report['n_steps']} steps"
    lines = [
        f"| call | idle, median (95 %) | beside {load}, median (95 %) | times idle | calls |",
        "|---|---|---|---|---|",
    ]
    for call, conditions in report["seconds"].items():
        typical = {name: statistics.median(values) for name, values in conditions.items()}
        cells = [
            f"{1e3 * typical[name]:.0f} ({1e3 * np.percentile(values, 95):.0f}) ms"
            for name, values in conditions.items()
        ]
        ratio = typical["saturated"] / typical["idle"]
        lines.append(f"| {call} | {' | '.join(cells)} | {ratio:.2f} | {len(conditions['idle'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_stream", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8, help="of explain, beside (default: 8)")
    parser.add_argument("--n-steps", type=int, default=200, help="of each of their requests (default: 200)")
    parser.add_argument("--blocks", type=int, default=3, help="idle and saturated ones each (default: 3)")
    parser.add_argument("--calls", type=int, default=15, help="of each kind in a block (default: 15)")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "stream.json")
    arguments = parser.parse_args()
    ensure_exported()
    with EmbeddedServer(ports=Ports.free(), log_file=OUTPUTS / "bench" / "triton.log") as server:
        seconds = measure(server, arguments.clients, arguments.n_steps, arguments.blocks, arguments.calls)
    report = {
        "command": " ".join(["python -m tools.bench_stream", *sys.argv[1:]]),
        "machine": describe_machine(torch.device("cpu")),
        "clients": arguments.clients,
        "n_steps": arguments.n_steps,
        "seconds": seconds,
    }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
