"""``make bench-stream``: time to the first response of `explain_stream` under a load of other clients' gradients.

On a real server, blocks alternate between an idle server and one with closed-loop clients that request `explain` with
many steps. Each stream is read up to its prediction and then cancelled; calls of `classify` are measured in turn with
it. Prints medians and their ratios and writes JSON.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc

from tools.bench.load import image_tensor, jpeg_images, saturated, triton_asker
from tools.evaluation.measuring import describe_machine, timed, write_report
from tools.export import repository_with
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports

CALLS = ("classify", "first response of a stream")


def first_response(url: str, image: bytes) -> float:
    """Seconds from a stream's request to its prediction; then the stream is cancelled."""
    client = tritonclient.grpc.InferenceServerClient(url)
    responses: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
    client.start_stream(callback=lambda result, error: responses.put((result, error)))
    started = time.perf_counter()
    client.async_stream_infer("explain_stream", [image_tensor(image)])
    result, error = responses.get(timeout=120)
    seconds = time.perf_counter() - started
    if error is not None:
        raise error
    result.as_numpy("PROBABILITIES")
    client.stop_stream(cancel_requests=True)
    client.close()
    return seconds


def measure(server: EmbeddedServer, clients: int, n_steps: int, blocks: int, calls: int) -> dict[str, Any]:
    """Seconds of each kind of call, on an idle server and under load."""
    url, images = server.grpc_url, jpeg_images()
    classify = triton_asker(url, "classify", images, ("PROBABILITIES",), {})
    seconds: dict[str, dict[str, list[float]]] = {call: {"idle": [], "saturated": []} for call in CALLS}

    def block(condition: str) -> None:
        for number in range(calls):
            seconds[CALLS[0]][condition].append(timed(partial(classify, number)))
            seconds[CALLS[1]][condition].append(first_response(url, images[number % len(images)]))
            time.sleep(0.3)  # the pass that was under way at the cancellation ends

    for number in range(3):
        classify(number)
        first_response(url, images[number])
    for _ in range(blocks):
        block("idle")
        with saturated(lambda: triton_asker(url, "explain", images, ("SALIENCY",), {"n_steps": n_steps}), clients):
            block("saturated")
    return seconds


def table(report: dict[str, Any]) -> str:
    """A Markdown table of medians and ratios."""
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
    parser = argparse.ArgumentParser(prog="python -m tools.bench.stream", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8, help="clients of explain that make the load (default: 8)")
    parser.add_argument("--n-steps", type=int, default=200, help="steps of their requests (default: 200)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each condition (default: 3)")
    parser.add_argument("--calls", type=int, default=15, help="calls of each kind in a block (default: 15)")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "stream.json")
    arguments = parser.parse_args()
    with EmbeddedServer(repository_with("shapes"), Ports.free(), log_file=OUTPUTS / "bench" / "triton.log") as server:
        seconds = measure(server, arguments.clients, arguments.n_steps, arguments.blocks, arguments.calls)
    report = {
        "command": " ".join(["python -m tools.bench.stream", *sys.argv[1:]]),
        "machine": describe_machine(),
        "clients": arguments.clients,
        "n_steps": arguments.n_steps,
        "seconds": seconds,
    }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
