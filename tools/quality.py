"""``make quality``: how far every rule and every tolerance is from the integral, on images that nothing was fitted to.

The integral is a midpoint rule of many points, added up in float64. For every image and output: the relative L2 error
in pixel space, the rank correlation of the saliency, the relative completeness gap and the steps spent; then the time
of each rule on a few images, and, for some maps that are served, deletion and insertion curves and how much of the heat
lies on the shapes. Writes JSON, Markdown tables and a plot.

Integrals, which take hours on a CPU, and what each image gave are kept in files, so that an interrupted run goes on
where it stopped. What was measured with other code for nodes and weights, or another calibration, is measured anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import path_rules
import torch
from attribution_engine import Explanation, Job
from torch import Tensor
from tqdm import tqdm

from tools.export import ensure_exported
from tools.faithfulness import curves
from tools.integrals import EXPLAINED_OUTPUTS, load_or_integrate
from tools.measuring import default_device, describe_machine, load_engine, load_manifest, medians, relative_distance
from tools.paths import OUTPUTS
from tools.quality_report import plot, table
from tools.shapes.dataset import draw_view, view_pixels
from tools.shapes.localisation import DILATION, dilate, peak_inside, share_inside

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
# The most that a tolerance may spend here: enough never to be what ends it.
MOST_STEPS = 400
# Views of the held-out split before this one serve in the tests.
FIRST_VIEW = 100
TIMED_IMAGES, TIMED_REPEATS = 2, 3
# Maps whose faithfulness is measured; a random one, which knows nothing of the image, is added.
SERVED_MAPS = {
    "gausslegendre 50": {"method": "gausslegendre", "n_steps": 50},
    "calibrated 20": {"method": "calibrated", "n_steps": 20},
    "tolerance 0.05": {"tolerance": 0.05},
    "riemann_right 2": {"method": "riemann_right", "n_steps": 2},
}


def candidates(job: Job) -> Iterator[tuple[str, Job]]:
    """Every rule of the report, as a name and a job."""
    for method in METHODS:
        for n_steps in STEPS:
            yield f"{method} {n_steps}", replace(job, method=method, n_steps=n_steps)
    for tolerance in TOLERANCES:
        yield f"tolerance {tolerance}", replace(job, tolerance=tolerance, n_steps=MOST_STEPS)


class HeldOut:
    """Held-out images, the demo network's engine, and what is kept between runs."""

    def __init__(self, device: torch.device, reference_steps: int, folder: Path) -> None:
        self.device, self.reference_steps = device, reference_steps
        self.engine = load_engine(device, "ieee")
        density = self.engine.density
        # Integrals are the network's; errors also depend on what places nodes and weighs them.
        self.folder = folder / load_manifest()["weights_sha256"][:12]
        code = Path(path_rules.__file__).parent
        files = [code / f"{name}.py" for name in ("path_rules", "path_quadrature", "path_density")]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
        digest.update(json.dumps({name: values.tolist() for name, values in density.gradient_change.items()}).encode())
        digest.update(json.dumps(density.error_scale).encode())
        self.results_file = self.folder / f"rules_{reference_steps}_{digest.hexdigest()[:12]}.jsonl"

    def job(self, view: int, output: str) -> Job:
        """An image against the zero baseline, for its predicted class."""
        image = view_pixels("test", [view])[0].to(self.device)
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

    def integral(self, view: int, job: Job) -> dict[str, Tensor]:
        """The integral of each output along a job's path, [3, height, width]; computed where it is not kept."""
        file = self.folder / f"integrals_{self.reference_steps}" / f"{view}.npz"
        return load_or_integrate(file, self.engine, job.image, job.target, self.reference_steps)

    def results(self, views: range, outputs: list[str]) -> list[dict[str, Any]]:
        """One entry for each image and output, measured where it is not known."""
        known = self.results_file.read_text().splitlines() if self.results_file.is_file() else []
        done = {(entry["view"], entry["output"]): entry for entry in map(json.loads, known)}
        wanted = [(view, output) for view in views for output in outputs]
        for view, output in tqdm([each for each in wanted if each not in done], desc="images x outputs"):
            done[view, output] = self.measure(view, output)
            with self.results_file.open("a") as lines:
                lines.write(json.dumps(done[view, output]) + "\n")
        return [done[each] for each in wanted]

    def measure(self, view: int, output: str) -> dict[str, Any]:
        """One image: name of a rule -> error, rank correlation, gap, steps and error estimate."""
        job = self.job(view, output)
        integral = self.integral(view, job)[output]
        names, jobs = zip(*candidates(job))
        found = self.engine.explain(jobs)
        rules = {name: compare(explanation, integral) for name, explanation in zip(names, found)}
        return {"view": view, "output": output, "rules": rules}

    def seconds(self) -> dict[str, float]:
        """Median seconds of each rule for the logit, interleaved."""
        taken: dict[str, list[float]] = {}
        jobs = [self.job(FIRST_VIEW + index, "logit") for index in range(TIMED_IMAGES)]
        for repeat in tqdm(range(-1, TIMED_REPEATS), desc="times"):
            for job in jobs:
                for name, each in candidates(job):
                    started = time.perf_counter()
                    self.engine.explain([each])[0].attributions.cpu()
                    if repeat >= 0:
                        taken.setdefault(name, []).append(time.perf_counter() - started)
        return medians(taken)

    def faithfulness(self, views: range) -> dict[str, dict[str, float]]:
        """For each of some maps: areas under both curves, and shares of the heat on the shapes; means over images."""
        found: dict[str, list[tuple[float, ...]]] = {}
        generator = torch.Generator().manual_seed(0)
        for view in tqdm(views, desc="faithfulness"):
            job = self.job(view, "logit")
            explained = self.engine.explain([replace(job, **options) for options in SERVED_MAPS.values()])
            maps = {name: each.attributions.sum(dim=0) for name, each in zip(SERVED_MAPS, explained)}
            maps["random"] = torch.rand(maps["gausslegendre 50"].shape, generator=generator).to(self.device)
            mask = dilate(draw_view("test", view).mask, DILATION)
            for name, saliency in maps.items():
                both = curves(self.engine.network, job.image, saliency, job.target)
                array = saliency.cpu().numpy()
                found.setdefault(name, []).append(
                    (both.deletion_area, both.insertion_area, share_inside(array, mask), peak_inside(array, mask))
                )
        keys = ("deletion", "insertion", "top_share_inside", "peak_inside")
        return {name: dict(zip(keys, map(statistics.fmean, zip(*values)))) for name, values in found.items()}


def compare(found: Explanation, integral: Tensor) -> dict[str, float]:
    """An explanation against the integral [3, height, width]."""
    change = found.attributions.sum() - found.convergence_delta
    return {
        "error": relative_distance(found.attributions, integral),
        "rank_correlation": rank_correlation(found.attributions.sum(dim=0), integral.sum(dim=0)),
        "gap": (found.convergence_delta / change).abs().item(),
        "steps": found.n_steps,
        "estimate": None if math.isnan(found.error_estimate) else found.error_estimate,  # JSON has no NaN
    }


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of two maps without ties."""
    ranks = torch.stack([each.flatten().argsort().argsort().double() for each in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--outputs", nargs="+", choices=EXPLAINED_OUTPUTS, default=list(EXPLAINED_OUTPUTS))
    parser.add_argument("--reference-steps", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=OUTPUTS / "quality", help="where results lie and are taken up")
    arguments = parser.parse_args()
    ensure_exported()
    held_out = HeldOut(arguments.device, arguments.reference_steps, arguments.folder)
    held_out.folder.mkdir(parents=True, exist_ok=True)
    views = range(FIRST_VIEW, FIRST_VIEW + arguments.images)
    report = {
        "command": " ".join(["python -m tools.quality", *sys.argv[1:]]),
        "machine": describe_machine(arguments.device),
        "images": arguments.images,
        "reference_steps": arguments.reference_steps,
        "results": held_out.results(views, arguments.outputs),
        "seconds": held_out.seconds(),
        "faithfulness": held_out.faithfulness(views),
    }
    (arguments.folder / "quality.json").write_text(json.dumps(report) + "\n")
    (arguments.folder / "quality.md").write_text(table(report))
    plot(report, arguments.folder / "quality.png")
    print(table(report), end="")
    print(f"wrote quality.json, quality.md and quality.png in {arguments.folder}")


if __name__ == "__main__":
    main()
