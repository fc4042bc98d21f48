"""Which implementation serves an architecture, and what it costs: ``python -m tools.bench.architectures``.

EfficientNet-Lite0 has its trained weights. The other networks have random ones, with statistics of photographs for
batch normalisation. Each is exported as `tools/export` does it. On one held-out photograph, in turns with Captum as its
examples call it, in a process of its own:

- time of 20 Gauss-Legendre steps, against Captum's;
- steps, time and true error of ``tolerance=0.05`` without a calibration, with discrete gradients and with gradients at
  points. The error is measured against a midpoint rule.

Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job
from classifier_loading import load_classifier
from engine_loading import build_engine
from torch import Tensor, nn
from tqdm import tqdm

from tools.bench.engine import CaptumProcess
from tools.classifiers import architectures
from tools.classifiers.loading import NETWORKS, load_source
from tools.classifiers.source import Source
from tools.evaluation.measuring import (
    describe_machine,
    explain,
    held_out_images,
    interleaved,
    medians,
    relative_distance,
    write_report,
)
from tools.imagenet.photographs import CALIBRATION, HELD_OUT, crops, view
from tools.paths import OUTPUTS
from tools.torchscript.served_classifier import script

ARCHITECTURES = (
    "lite0",
    "resnet18",
    "timm:resnet26d",
    "vgg11",
    "densenet121",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
)
STEPS, TOLERANCE, MOST_STEPS, REFERENCE_STEPS = 20, 0.05, 400, 256
# Photographs from which batch normalisation takes its statistics.
STATISTICS_IMAGES = 8


def load_network(name: str) -> Source:
    """A network of ``NETWORKS``, or another with the weights that are described above, as the exporter loads them."""
    if name in NETWORKS:
        return load_source(name)
    torch.manual_seed(0)
    network = architectures.build(name)
    for weight in network.parameters():
        if weight.dim() == 2 and not weight.any():  # the head of a vision transformer
            nn.init.normal_(weight, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.pt"
        torch.save(network.state_dict(), file)
        source = load_source(str(file), name)
    for layer in source.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # the mean of what it sees
    views = [view(image, source.preprocessing) for _, image in crops(CALIBRATION, STATISTICS_IMAGES)]
    with torch.no_grad():
        source.module(torch.stack(views))
    source.module.eval()
    return source


def held_out(name: str, source: Source, count: int) -> list[Tensor]:
    """Inputs for a network of ``load_network`` that nothing was fitted to: drawn scenes for ``shapes``, else crops."""
    if name == "shapes":
        return list(held_out_images(name, count).values())
    return [view(image, source.preprocessing) for _, image in crops(HELD_OUT, count)]


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    source = load_network(name)
    network, preprocessing = source.module, source.preprocessing
    (image,) = held_out(name, source, 1)
    with torch.no_grad():
        target = int(network(image[None]).argmax())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        served, _ = script(network, preprocessing.input_shape, file)
        cpu = torch.device("cpu")
        engine = build_engine(load_classifier(file, cpu), cpu, preprocessing.input_shape)

    def run(**options: Any) -> Explanation:
        # At zeros the layer norms of a vision transformer are singular.
        baseline = torch.full_like(image, -1.0)
        return explain(engine, [Job(image, baseline, target, **options)])[0]

    peer = CaptumProcess(network, image[None], torch.tensor([target]))
    refining: dict[str, Any] = {"tolerance": TOLERANCE, "n_steps": MOST_STEPS}
    seconds = medians(
        interleaved(
            {
                "captum": lambda: peer.run([0], STEPS),
                "engine": lambda: run(n_steps=STEPS),
                "tolerance": lambda: run(**refining),
            },
            repeats,
            always_warm=("captum",),
        )
    )
    reference = run(n_steps=REFERENCE_STEPS, method="riemann_middle").attributions
    rules = {"points": run_at_points(engine, run, refining)}
    if engine.network.has_mean_slopes:
        rules["discrete"] = run(**refining)
    return {
        "implementation": type(served).__name__,
        "limitation": served.limitation,
        "input": list(preprocessing.input_shape),
        "seconds": seconds,
        **{rule: summary(explanation, reference) for rule, explanation in rules.items()},
    }


def run_at_points(engine: AttributionEngine, run: Any, options: dict[str, Any]) -> Explanation:
    """The same without discrete gradients."""
    before, engine.network.has_mean_slopes = engine.network.has_mean_slopes, False
    try:
        explanation: Explanation = run(**options)
    finally:
        engine.network.has_mean_slopes = before
    return explanation


def summary(explanation: Explanation, reference: Tensor) -> dict[str, float]:
    """What an explanation took, and how exact it is."""
    assert explanation.convergence_delta is not None
    size = explanation.attributions.abs().sum().item()
    return {
        "steps": explanation.n_steps,
        "seconds": explanation.seconds,
        "estimate": explanation.error_estimate,
        "error": relative_distance(explanation.attributions, reference),
        "gap": abs(explanation.convergence_delta.item()) / size,
    }


def to_markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table."""
    tolerance = f"`tolerance={TOLERANCE}`: steps, error, gap, time"
    titles = ["network", "implementation", f"{STEPS} steps (times as fast as Captum)", tolerance, "the same at points"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]

    def cells(rule: dict[str, float] | None) -> str:
        if rule is None:
            return ""
        return f"{rule['steps']}, {rule['error']:.3f}, {rule['gap']:.0e}, {1000 * rule['seconds']:.0f} ms"

    for name, row in rows.items():
        seconds = row["seconds"]
        lines.append(
            f"| {name} | {row['implementation']} | {1000 * seconds['engine']:.0f} ms "
            f"({seconds['captum'] / seconds['engine']:.2f}) | {cells(row.get('discrete'))} | {cells(row['points'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES), help="names of --arch, or lite0")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "architectures.json")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": describe_machine(), "steps": STEPS, "tolerance": TOLERANCE, "networks": {}}
    for name in tqdm(arguments.names, desc="architectures"):
        report["networks"][name] = measure(name, arguments.repeats)
        write_report(report, to_markdown(report["networks"]), arguments.out)


if __name__ == "__main__":
    main()
