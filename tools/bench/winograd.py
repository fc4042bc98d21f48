"""``python -m tools.bench.winograd``: what Winograd's convolutions save on a CPU.

Two servers of the shapes network, of which one convolves directly (`cpu_winograd` 0), answer the same requests in
turn. Then explanations by both are compared with float64 at the same nodes. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attribution_engine import AttributionEngine
from engine_loading import CPU_MAX_ROWS

from tools.bench.engine import Contestants
from tools.bench.load import jpeg_images, triton_asker
from tools.bench.overload import with_settings
from tools.bench.processes import memory_sampler
from tools.evaluation.measuring import (
    describe_machine,
    explain,
    interleaved,
    medians,
    model_file,
    relative_distance,
    write_report,
)
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports

CPU = torch.device("cpu")
REQUESTS: dict[str, dict[str, Any]] = {
    "50 steps": {"n_steps": 50},
    "20 steps": {"n_steps": 20},
    "calibrated, 16 steps": {"method": "calibrated", "n_steps": 16},
}
IMAGES, STEPS = 6, 50


def compare_served(folder: Path, repeats: int) -> dict[str, Any]:
    """Median seconds of each request at both servers, and the memory of their processes in MB."""
    servers = {
        name: EmbeddedServer(
            with_settings(folder / name, "integrated_gradients", cpu_winograd=chosen),
            Ports.free(),
            log_file=folder / f"{name}.log",
        )
        for name, chosen in (("direct", 0), ("winograd", 1))
    }
    images = jpeg_images()
    rows: dict[str, Any] = {}
    with servers["direct"], servers["winograd"]:
        for name, parameters in REQUESTS.items():
            runs: dict[str, Callable[[], Any]] = {}
            for kind, server in servers.items():
                ask = triton_asker(server.grpc_url, "explain", images, ("PROBABILITIES", "HEATMAP"), parameters)
                runs[kind] = partial(ask, 0)
            rows[name] = medians(interleaved(runs, repeats))
        memory = {}
        for kind, server in servers.items():
            with memory_sampler(server.process.pid) as sampler:
                runs[kind]()
            memory[kind] = max(sampler.samples)
    return {"median_seconds": rows, "memory_mb": memory}


def compare_errors() -> dict[str, list[float]]:
    """Relative L2 distance of explanations from those in float64 at the same nodes, one for each image."""
    contestants = {kind: Contestants(CPU, kind, IMAGES) for kind in ("ieee", "tf32")}
    exact = AttributionEngine(torch.jit.load(str(model_file()), map_location=CPU).eval().double(), CPU_MAX_ROWS)
    errors: dict[str, list[float]] = {"direct": [], "winograd": []}
    for job in contestants["ieee"].jobs((STEPS,) * IMAGES):
        wide = replace(job, image=job.image.double(), baseline=job.baseline.double(), image_logits=None)
        expected = explain(exact, [wide])[0].attributions
        for name, kind in (("direct", "ieee"), ("winograd", "tf32")):
            found = explain(contestants[kind].engine, [job])[0].attributions
            errors[name].append(relative_distance(found.double(), expected))
    return errors


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| | direct | Winograd | times |", "|---|---|---|---|"]
    for name, seconds in report["served"]["median_seconds"].items():
        direct, winograd = seconds["direct"], seconds["winograd"]
        lines.append(f"| {name} | {1e3 * direct:.1f} ms | {1e3 * winograd:.1f} ms | {direct / winograd:.2f} |")
    memory, errors = report["served"]["memory_mb"], report["errors"]
    lines += [
        f"| memory of the server | {memory['direct']:.0f} MB | {memory['winograd']:.0f} MB | |",
        f"| distance from float64, {STEPS} steps, least to most of {IMAGES} images "
        f"| {min(errors['direct']):.1e} to {max(errors['direct']):.1e} "
        f"| {min(errors['winograd']):.1e} to {max(errors['winograd']):.1e} | |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.winograd", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "winograd.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "command": " ".join(["python -m tools.bench.winograd", *sys.argv[1:]]),
            "machine": describe_machine(CPU),
            "served": compare_served(Path(folder), arguments.repeats),
            "errors": compare_errors(),
        }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
