"""``make bench-questions``: what further questions about one picture cost.

In the engine: three classes of one image against one of them, and ``tolerance=0.02`` that goes on from the stages of
0.1 against 0.02 alone. On a server that keeps answers: a repeated ``explain``, and one that draws it differently,
against ``classify``. All of each comparison take turns. Prints medians and their ratios and writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attribution_engine import AttributionEngine
from attribution_job import Job

from tools.bench.load import jpeg_images, triton_asker
from tools.bench.overload import with_settings
from tools.evaluation.measuring import (
    default_device,
    describe_machine,
    distribution,
    explain,
    held_out_images,
    interleaved,
    load_engine,
    medians,
    write_report,
)
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports

STEPS, CLASSES, FIRST, SECOND, MOST_STEPS = 20, 3, 0.1, 0.02, 1000
KEPT_BYTES = 64_000_000


def jobs_of(engine: AttributionEngine, network: str, count: int) -> list[list[Job]]:
    """For each image the jobs of its likeliest classes, as `integrated_gradients` makes them."""
    jobs = []
    for name, pixels in held_out_images(network, count).items():
        image = pixels.to(default_device())
        with torch.no_grad():
            logits = engine.network(image[None])[0]
        first = Job(image, torch.zeros_like(image), 0, STEPS, image_logits=logits, baseline_key="zero", ends_key=name)
        jobs.append([replace(first, target=target) for target in logits.topk(CLASSES).indices.tolist()])
    return jobs


def measure_engine(network: str, images: int, repeats: int) -> list[dict[str, Any]]:
    """For each image, median seconds, and gradients where their number depends on the image."""
    engine = load_engine(default_device(), "ieee", network=network)
    measured = []
    for jobs in jobs_of(engine, network, images):
        coarse = replace(jobs[0], tolerance=FIRST, n_steps=MOST_STEPS, keeps_state=True)
        fine = replace(coarse, tolerance=SECOND, keeps_state=False)

        def both(coarse: Job = coarse, fine: Job = fine) -> int:
            (rough,) = explain(engine, [coarse])
            (exact,) = explain(engine, [replace(fine, state=rough.state)])
            return exact.n_steps

        discrete = [replace(job, method="calibrated") for job in jobs]
        runs: dict[str, Callable[[], Any]] = {
            "one class": partial(explain, engine, jobs[:1]),
            "three classes": partial(explain, engine, jobs),
            "one class, calibrated": partial(explain, engine, discrete[:1]),
            "three classes, calibrated": partial(explain, engine, discrete),
            f"tolerance {SECOND}": partial(explain, engine, [fine]),
            f"tolerance {FIRST}, then {SECOND}": both,
        }
        gradients = {f"tolerance {SECOND}": explain(engine, [fine])[0].n_steps, "one after the other": both()}
        measured.append({"seconds": medians(interleaved(runs, repeats)), "gradients": gradients})
    return measured


def measure_server(repeats: int) -> dict[str, dict[str, float]]:
    """The distribution of the seconds of each call, on an idle server that has explained all images once."""
    with TemporaryDirectory() as folder:
        repository = with_settings(Path(folder), "integrated_gradients", kept_bytes=KEPT_BYTES)
        with EmbeddedServer(repository, Ports.free(), log_file=OUTPUTS / "bench" / "triton.log") as server:
            images = jpeg_images()[:4]

            def asker(model: str, outputs: tuple[str, ...], **parameters: Any) -> Callable[[], Any]:
                ask = triton_asker(server.grpc_url, model, images, outputs, parameters)
                numbers = itertools.count()
                return lambda: ask(next(numbers))

            explained = ("SALIENCY", "HEATMAP")
            runs = {
                "classify": asker("classify", ("PROBABILITIES",)),
                "repeated explain, saliency": asker("explain", explained[:1], n_steps=STEPS),
                "repeated explain, saliency and heatmap": asker("explain", explained, n_steps=STEPS),
                "redrawn heatmap": asker("explain", explained[1:], n_steps=STEPS, polarity="all", overlay="masked"),
            }
            for run in runs.values():
                for _ in images:
                    run()
            return {name: distribution(seconds) for name, seconds in interleaved(runs, repeats).items()}


def table(report: dict[str, Any]) -> str:
    """Markdown tables of medians and ratios."""
    lines = [
        "| network | image | three classes, times one | the same, `calibrated` "
        f"| {FIRST} then {SECOND}, times {SECOND} alone | gradients of both |",
        "|---|---|---|---|---|---|",
    ]
    for network, images in report["engine"].items():
        for number, image in enumerate(images):
            seconds = list(image["seconds"].values())  # in pairs
            ratios = " | ".join(f"{more / one:.2f}" for one, more in zip(seconds[::2], seconds[1::2]))
            counts = ", ".join(map(str, reversed(image["gradients"].values())))
            lines.append(f"| {network} | {number} | {ratios} | {counts} |")
    calls = {name: seconds["p50"] for name, seconds in report["server"].items()}
    base = calls["classify"]
    lines += ["", "| call | median ms | times classify |", "|---|---|---|"]
    lines += [f"| {call} | {1e3 * value:.1f} | {value / base:.2f} |" for call, value in calls.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.questions", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4, help="of each network (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each run in the engine (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=100, help="of each kind to the server (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", default=["lite0", "shapes"])
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "questions.json")
    arguments = parser.parse_args()
    report = {
        "command": " ".join(["python -m tools.bench.questions", *sys.argv[1:]]),
        "machine": describe_machine(),
        "engine": {name: measure_engine(name, arguments.images, arguments.repeats) for name in arguments.networks},
        "server": measure_server(arguments.calls),
    }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
