"""``make quality``: the error of every rule and every tolerance against the integral, on held-out images.

The images are not those of any calibration: for the network of drawn shapes its generator's test split, with
``NETWORK=lite0`` crops of photographs. The integral is a midpoint rule of many points, added up in float64. For every
image and output, it measures the relative L2 error in pixel space, the share of the most salient pixels that the
integral has too, the rank correlation of the saliency, the relative completeness gap and the number of steps. Then it
measures the time of each rule on a few images and, for some served maps, deletion and insertion curves and how much of
the heat lies on a drawn shape. Writes JSON, Markdown tables and a plot.

Integrals, which take hours on a CPU, and results of images are kept in files, so that an interrupted run continues
where it stopped. Results of other code for nodes and weights, or of another calibration, are not reused.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import path_rules
import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job
from classifier_files import Preprocessing
from evidence_regions import Regions
from heatmap_drawing import pictures
from torch import Tensor
from tqdm import tqdm

from tools.evaluation.faithfulness import curves
from tools.evaluation.integrals import EXPLAINED_OUTPUTS, load_or_integrate
from tools.evaluation.localisation import DILATION, dilate, peak_inside, share_inside
from tools.evaluation.measuring import (
    default_device,
    describe_machine,
    explain,
    held_out_images,
    load_engine,
    load_manifest,
    medians,
    relative_distance,
    rounded,
    write_report,
)
from tools.evaluation.quality_report import faithfulness_table, plot, summarise, table
from tools.imagenet import photographs
from tools.paths import OUTPUTS
from tools.shapes.dataset import draw_view

METHODS = (
    "gausslegendre",
    "riemann_left",
    "riemann_right",
    "riemann_middle",
    "riemann_trapezoid",
    "calibrated",
)
STEPS = (8, 16, 20, 32, 50, 100)
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01)
# Limit of steps for a tolerance, so high that it is never reached.
MOST_STEPS = 1000
# Networks that come with a calibration, which the comparison needs.
CALIBRATED_NETWORKS = ("shapes", "lite0")
# Points of the integral: its error is at most a hundredth of that of Captum's with 50 steps.
REFERENCE_STEPS = {"shapes": 2048}
OTHER_REFERENCE_STEPS = 4096
# Shares of most salient pixels that are compared.
TOP_SHARES = (0.01, 0.05)
# The tests use earlier views of the held-out split.
FIRST_VIEW = 100
TIMED_IMAGES, TIMED_REPEATS = 2, 3
# Maps whose faithfulness is measured; a random map, and the regions of one of them, are added for comparison.
SERVED_MAPS: dict[str, dict[str, Any]] = {
    "gausslegendre 50": {"method": "gausslegendre", "n_steps": 50},
    "calibrated 20": {"method": "calibrated", "n_steps": 20},
    "tolerance 0.05": {"tolerance": 0.05},
    "riemann_right 2": {"method": "riemann_right", "n_steps": 2},
}
# The map whose regions are measured: `overlay=regions`, each pixel with the evidence a pixel of its region.
REGIONS_OF = "gausslegendre 50"


@dataclass(frozen=True)
class Rules:
    """What is measured: each method with each number of steps, each tolerance with and without a calibration."""

    methods: Sequence[str] = METHODS
    steps: Sequence[int] = STEPS
    tolerances: Sequence[float] = TOLERANCES

    def fixed(self, job: Job) -> Iterator[tuple[str, Job]]:
        """Names and jobs of the methods."""
        for method in self.methods:
            for n_steps in self.steps:
                yield f"{method} {n_steps}", replace(job, method=method, n_steps=n_steps)

    def tolerant(self, job: Job, name: str = "tolerance") -> Iterator[tuple[str, Job]]:
        """Names and jobs of the tolerances."""
        for tolerance in self.tolerances:
            yield f"{name} {tolerance}", replace(job, tolerance=tolerance, n_steps=MOST_STEPS)


class HeldOut:
    """Held-out images, a network's engine, and the files that are kept between runs."""

    def __init__(self, network: str, device: torch.device, reference_steps: int, folder: Path, rules: Rules) -> None:
        self.network, self.device, self.reference_steps, self.rules = network, device, reference_steps, rules
        self.engine = load_engine(device, "ieee", network=network)
        self.uncalibrated = AttributionEngine(self.engine.network, max_rows=self.engine.max_rows)
        density, manifest = self.engine.density, load_manifest(network)
        assert density is not None  # `load_engine` loads it
        self.preprocessing = Preprocessing.from_manifest(manifest["preprocessing"])
        # Integrals depend on the network only; errors also on the code and calibration that place and weigh nodes.
        self.folder = folder / manifest["weights_sha256"][:12]
        code = Path(path_rules.__file__).parent
        files = [
            code / f"{name}.py"
            for name in ("path_rules", "richardson_rule", "error_law", "path_quadrature", "path_density")
        ]
        digest = hashlib.sha256("".join(map(_statements, files)).encode())
        digest.update(json.dumps({name: values.tolist() for name, values in density.density.items()}).encode())
        digest.update(repr((density.law, rules)).encode() + _statements(Path(photographs.__file__)).encode())
        self.results_file = self.folder / f"rules_{reference_steps}_{digest.hexdigest()[:12]}.jsonl"

    def images(self, count: int) -> dict[str, Tensor]:
        """Images by name, normalised, float32 [channels, height, width]."""
        images = held_out_images(self.network, count, FIRST_VIEW)
        return {name: image.to(self.device) for name, image in images.items()}

    def job(self, image: Tensor, output: str) -> Job:
        """A job for an image's predicted class, from the zero baseline."""
        with torch.no_grad():
            logits = self.engine.network(image[None])[0]
        return Job(
            image,
            torch.zeros_like(image),
            int(logits.argmax()),
            probability=output == "probability",
            image_logits=logits,
            baseline_key="zero",
        )

    def integral(self, name: str, job: Job) -> dict[str, Tensor]:
        """The integral of each output along a job's path, [channels, height, width], from its file if there is one."""
        # An image of the same name may have other pixels.
        digest = hashlib.sha256(job.image.cpu().numpy().tobytes()).hexdigest()
        file = self.folder / f"integrals_{self.reference_steps}" / f"{name}_{digest[:8]}.npz"
        return load_or_integrate(file, self.engine, job.image, job.target, self.reference_steps)

    def results(self, images: dict[str, Tensor], outputs: list[str]) -> list[dict[str, Any]]:
        """One entry for each image and output, from the file of an earlier run if it has it."""
        known = self.results_file.read_text().splitlines() if self.results_file.is_file() else []
        done = {(entry["image"], entry["output"]): entry for entry in map(json.loads, known)}
        wanted = [(name, output) for name in images for output in outputs]
        for name, output in tqdm([key for key in wanted if key not in done], desc="images x outputs"):
            done[name, output] = self.measure(name, images[name], output)
            with self.results_file.open("a") as lines:
                lines.write(json.dumps(done[name, output]) + "\n")
        return [done[key] for key in wanted]

    def measure(self, name: str, image: Tensor, output: str) -> dict[str, Any]:
        """Results for one image and output: name of a rule -> the values of ``compare``."""
        job = self.job(image, output)
        integral = self.integral(name, job)[output]
        calibrated = dict([*self.rules.fixed(job), *self.rules.tolerant(job)])
        explanations = dict(zip(calibrated, explain(self.engine, list(calibrated.values()))))
        uncalibrated = dict(self.rules.tolerant(job, "uncalibrated"))
        explanations |= dict(zip(uncalibrated, explain(self.uncalibrated, list(uncalibrated.values()))))
        rules = {rule: compare(explanation, integral) for rule, explanation in explanations.items()}
        return {"image": name, "output": output, "rules": rules}

    def seconds(self, images: Sequence[Tensor]) -> dict[str, float]:
        """Median seconds of each rule for the logit; the rules take turns."""
        taken: dict[str, list[float]] = {}
        jobs = [self.job(image, "logit") for image in images]
        for repeat in tqdm(range(-1, TIMED_REPEATS), desc="times"):
            for job in jobs:
                rules = [(self.engine, rule) for rule in (*self.rules.fixed(job), *self.rules.tolerant(job))]
                rules += [(self.uncalibrated, rule) for rule in self.rules.tolerant(job, "uncalibrated")]
                for engine, (name, rule_job) in rules:
                    started = time.perf_counter()
                    explain(engine, [rule_job])[0].attributions.cpu()
                    if repeat >= 0:
                        taken.setdefault(name, []).append(time.perf_counter() - started)
        return medians(taken)

    def faithfulness(self, images: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """For each map, means over images: areas under both curves, and on shapes the share of the heat on them."""
        by_map: dict[str, list[dict[str, float]]] = {}
        generator = torch.Generator().manual_seed(0)
        for index, image in tqdm(images.items(), desc="faithfulness"):
            job = self.job(image, "logit")
            explanations = explain(self.engine, [replace(job, **options) for options in SERVED_MAPS.values()])
            maps = {name: e.attributions.sum(dim=0) for name, e in zip(SERVED_MAPS, explanations)}
            picture = pictures(image.cpu().numpy()[None], self.preprocessing)[0]
            regions = Regions.of(picture, maps[REGIONS_OF].cpu().numpy())
            maps[f"regions of {REGIONS_OF}"] = torch.from_numpy(regions.density).float().to(self.device)
            maps["random"] = torch.rand(image.shape[1:], generator=generator).to(self.device)
            for name, saliency in maps.items():
                both = curves(self.engine.network, job.image, saliency, job.target)
                values = {"deletion": both.deletion_area, "insertion": both.insertion_area}
                if self.network == "shapes":
                    array, mask = saliency.cpu().numpy(), dilate(draw_view("test", int(index)).mask, DILATION)
                    values |= {"top_share_inside": share_inside(array, mask), "peak_inside": peak_inside(array, mask)}
                by_map.setdefault(name, []).append(values)
        return {
            name: {key: statistics.fmean(image_values[key] for image_values in values) for key in values[0]}
            for name, values in by_map.items()
        }


def _statements(file: Path) -> str:
    """What a module does: its statements without comments and docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


def compare(explanation: Explanation, integral: Tensor) -> dict[str, float | None]:
    """An explanation's errors against the integral [channels, height, width]."""
    assert explanation.convergence_delta is not None  # it is None only if it was not requested
    change = explanation.attributions.sum() - explanation.convergence_delta
    saliency, exact = explanation.attributions.sum(dim=0), integral.sum(dim=0)
    return {
        "error": relative_distance(explanation.attributions, integral),
        **{f"top_{share:.0%}": overlap(saliency, exact, share) for share in TOP_SHARES},
        "rank_correlation": rank_correlation(saliency, exact),
        "gap": (explanation.convergence_delta / change).abs().item(),
        "steps": explanation.n_steps,
        "estimate": None if math.isnan(explanation.error_estimate) else explanation.error_estimate,  # JSON has no NaN
    }


def overlap(saliency: Tensor, exact: Tensor, share: float) -> float:
    """The share of one map's most salient pixels that are among as many most salient pixels of the other."""
    count = round(share * saliency.numel())
    salient, exact_salient = (set(values.flatten().topk(count).indices.tolist()) for values in (saliency, exact))
    return len(salient & exact_salient) / count


def rank_correlation(saliency: Tensor, exact: Tensor) -> float:
    """Spearman's rank correlation of two maps without ties."""
    ranks = torch.stack([values.flatten().argsort().argsort().double() for values in (saliency, exact)])
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    network = os.environ.get("NETWORK") or "shapes"
    parser.add_argument("--network", default=network, help="shapes or lite0 (default: NETWORK, or shapes)")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--outputs", nargs="+", choices=EXPLAINED_OUTPUTS, default=list(EXPLAINED_OUTPUTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--tolerances", nargs="+", type=float, default=list(TOLERANCES))
    parser.add_argument("--reference-steps", type=int, help="default: 2048 for shapes, 4096 for others")
    parser.add_argument(
        "--faithfulness", action="store_true", help="only the areas under the deletion and insertion curves, in minutes"
    )
    parser.add_argument("--folder", type=Path, default=OUTPUTS / "quality", help="where results are kept between runs")
    arguments = parser.parse_args()
    if arguments.network not in CALIBRATED_NETWORKS:
        parser.error(f"{arguments.network} has no calibration here; there are {', '.join(CALIBRATED_NETWORKS)}")
    if "calibrated" not in arguments.methods or len(arguments.methods) < 2 or len(arguments.steps) < 2:
        parser.error("calibrated is compared with at least one other method, at two numbers of steps or more")
    steps = arguments.reference_steps or REFERENCE_STEPS.get(arguments.network, OTHER_REFERENCE_STEPS)
    rules = Rules(tuple(arguments.methods), tuple(arguments.steps), tuple(arguments.tolerances))
    held_out = HeldOut(arguments.network, arguments.device, steps, arguments.folder, rules)
    held_out.folder.mkdir(parents=True, exist_ok=True)
    images = held_out.images(arguments.images)
    report: dict[str, Any] = {
        "command": " ".join(["python -m tools.quality", *sys.argv[1:]]),
        "machine": describe_machine(arguments.device),
        "network": arguments.network,
        "images": arguments.images,
        "reference_steps": steps,
    }
    if arguments.faithfulness:
        report["faithfulness"] = held_out.faithfulness(images)
        file = arguments.folder / f"faithfulness_{arguments.network}.json"
        write_report(report, "\n".join(faithfulness_table(report)), file)
        return
    report |= {
        "rules": summarise(held_out.results(images, arguments.outputs)),
        "seconds": held_out.seconds(list(images.values())[:TIMED_IMAGES]),
        "faithfulness": held_out.faithfulness(images),
    }
    name = f"quality_{arguments.network}"
    (arguments.folder / f"{name}.json").write_text(json.dumps(rounded(report), indent=1) + "\n")
    (arguments.folder / f"{name}.md").write_text(table(report))
    plot(report, arguments.folder / f"{name}.png")
    print(table(report), end="")
    print(f"wrote {name}.json, {name}.md and {name}.png in {arguments.folder}")


if __name__ == "__main__":
    main()
