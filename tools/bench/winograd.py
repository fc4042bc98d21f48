"""``python -m tools.bench.winograd``: what Winograd's convolutions save on a CPU.

Two servers of the shapes network, of which one convolves directly (`cpu_winograd` 0), answer the same requests in
turn. Then explanations by both are compared with float64 at the same nodes: a faster way may add at most a third of the
quadrature error at these steps. The other networks have random weights (see ``tools.bench.architectures``). Prints
tables and writes JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from classifier_loading import load_classifier
from engine_loading import CPU_MAX_ROWS, build_engine
from tqdm import tqdm

from tools.bench.architectures import held_out, load_network
from tools.bench.load import jpeg_images, triton_asker
from tools.bench.overload import with_settings
from tools.bench.processes import memory_sampler
from tools.evaluation.measuring import (
    describe_machine,
    explain,
    interleaved,
    medians,
    relative_distance,
    write_report,
)
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports
from tools.torchscript.served_classifier import script

CPU = torch.device("cpu")
REQUESTS: dict[str, dict[str, Any]] = {
    "50 steps": {"n_steps": 50},
    "20 steps": {"n_steps": 20},
    "calibrated, 16 steps": {"method": "calibrated", "n_steps": 16},
}
NETWORKS = ("shapes", "resnet34", "resnet50")
IMAGES, STEPS, REFERENCE_STEPS = 4, 50, 512


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


def measure_gate(network: str) -> dict[str, list[float]]:
    """Relative L2 distances, one for each image, for the gate of a faster precision.

    ``quadrature`` is that of float64 at the nodes to the midpoint rule that is the reference integral. The others are
    those of both engines to float64 at the same nodes.

    Args:
        network: ``shapes``, or one that ``tools.bench.architectures`` loads.
    """
    source = load_network(network)
    shape = source.preprocessing.input_shape
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        script(source.module, shape, file)
        engines = {
            name: build_engine(load_classifier(file, CPU), CPU, shape, precision=precision, winograd=True)
            for name, precision in (("direct", "ieee"), ("winograd", "tf32"))
        }
        exact = AttributionEngine(torch.jit.load(str(file), map_location=CPU).eval().double(), CPU_MAX_ROWS)
    errors: dict[str, list[float]] = {"quadrature": [], "direct": [], "winograd": []}
    for image in tqdm(held_out(network, source, IMAGES), desc=network):
        with torch.no_grad():
            target = int(engines["direct"].network(image[None]).argmax())
        job = Job(image, torch.zeros_like(image), target, STEPS)
        wide = replace(job, image=image.double(), baseline=job.baseline.double())
        at_nodes = explain(exact, [wide])[0].attributions
        integral = replace(job, n_steps=REFERENCE_STEPS, method="riemann_middle")
        limit = explain(engines["direct"], [integral])[0].attributions
        errors["quadrature"].append(relative_distance(at_nodes, limit.double()))
        for name, engine in engines.items():
            found = explain(engine, [job])[0].attributions
            errors[name].append(relative_distance(found.double(), at_nodes))
    return errors


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| | direct | Winograd | times |", "|---|---|---|---|"]
    for name, seconds in report["served"]["median_seconds"].items():
        direct, winograd = seconds["direct"], seconds["winograd"]
        lines.append(f"| {name} | {1e3 * direct:.1f} ms | {1e3 * winograd:.1f} ms | {direct / winograd:.2f} |")
    memory = report["served"]["memory_mb"]
    lines += [
        f"| memory of the server | {memory['direct']:.0f} MB | {memory['winograd']:.0f} MB | |",
        "",
        f"| {STEPS} steps, {IMAGES} images: median (most) | quadrature error | direct adds | Winograd adds | share |",
        "|---|---|---|---|---|",
    ]
    for network, errors in report["gate"].items():
        cells = [f"{statistics.median(values):.1e} ({max(values):.1e})" for values in errors.values()]
        share = statistics.median(errors["winograd"]) / statistics.median(errors["quadrature"])
        lines.append(f"| {network} | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.winograd", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="of the gate (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "winograd.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "command": " ".join(["python -m tools.bench.winograd", *sys.argv[1:]]),
            "machine": describe_machine(CPU),
            "served": compare_served(Path(folder), arguments.repeats),
            "gate": {network: measure_gate(network) for network in arguments.networks},
        }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
