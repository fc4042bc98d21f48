"""``make quality``: how far each rule and each tolerance is from the integral, on images that nothing was fitted to.

The integral is a midpoint rule of many points. For every image and output: the relative L2 error in pixel space, the
relative completeness gap, and the steps spent; medians and 95th percentiles over images as a table. What an image
gave is kept in a file of JSON lines, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution_engine import Explanation, IntegratedGradients, Job
from engine_loading import build_engine
from tqdm import tqdm

from tools.bench_engine import MODEL_FILE, SHAPE, describe_machine, relative_distance
from tools.export import ensure_exported
from tools.paths import OUTPUTS
from tools.shapes.dataset import draw_view
from tools.shapes.train import normalise

METHODS = ("gausslegendre", "riemann_middle", "riemann_trapezoid")
STEPS = (8, 16, 20, 32, 50, 100)
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01)
# The most that a tolerance may spend here: enough never to be what ends it.
MOST_STEPS = 400
# Views of the held-out split before this one serve in the tests.
FIRST_VIEW = 100


def candidates(job: Job) -> Iterator[tuple[str, Job]]:
    """Every rule of the report, as a name and a job."""
    for method in METHODS:
        for n_steps in STEPS:
            yield f"{method} {n_steps}", replace(job, method=method, n_steps=n_steps)
    for tolerance in TOLERANCES:
        yield f"tolerance {tolerance}", replace(job, tolerance=tolerance, n_steps=MOST_STEPS)


def measure(engine: IntegratedGradients, view: int, output: str, reference_steps: int) -> dict[str, Any]:
    """One image: name of a rule -> error, gap, steps and error estimate."""
    device = next(engine.network.module.parameters()).device
    pixels = torch.from_numpy(draw_view("test", view).image.copy()).permute(2, 0, 1)[None]
    image = normalise(pixels)[0].to(device)
    with torch.no_grad():
        target = int(engine.network(image[None]).argmax())
    job = Job(image, torch.zeros_like(image), target, probability=output == "probability", baseline_key="zero")
    (integral,) = engine.explain([replace(job, method="riemann_middle", n_steps=reference_steps)])
    names, jobs = zip(*candidates(job))
    found = {
        name: _errors(explanation, integral.attributions) for name, explanation in zip(names, engine.explain(jobs))
    }
    return {"view": view, "output": output, "reference_steps": reference_steps, "rules": found}


def _errors(found: Explanation, integral: torch.Tensor) -> dict[str, float]:
    change = found.attributions.sum() - found.convergence_delta
    return {
        "error": relative_distance(found.attributions, integral),
        "gap": (found.convergence_delta / change).abs().item(),
        "steps": found.n_steps,
        "estimate": found.error_estimate,
    }


def table(results: list[dict[str, Any]], output: str) -> str:
    """Markdown: a row for each rule."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for name, numbers in result["rules"].items():
            for key, value in numbers.items():
                values[name][key].append(value)
    lines = [
        f"`{output}`, {len(results)} images, reference: midpoint rule of {results[0]['reference_steps']} points",
        "",
        "| rule | steps, median | error, median | error, 95 % | gap, median | within tolerance |",
        "|---|---|---|---|---|---|",
    ]
    for name, numbers in values.items():
        kind, setting = name.split()
        within = f"{np.mean(np.array(numbers['error']) <= float(setting)):.0%}" if kind == "tolerance" else ""
        high = np.percentile(numbers["error"], 95)
        lines.append(
            f"| {name} | {np.median(numbers['steps']):.0f} | {np.median(numbers['error']):.4f} | {high:.4f} "
            f"| {np.median(numbers['gap']):.4f} | {within} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.quality", description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--outputs", nargs="+", choices=("logit", "probability"), default=["logit", "probability"])
    parser.add_argument("--reference-steps", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=OUTPUTS / "quality", help="where results lie and are taken up")
    arguments = parser.parse_args()
    ensure_exported()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / f"images_{arguments.reference_steps}.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    wanted = [
        (view, output) for output in arguments.outputs for view in range(FIRST_VIEW, FIRST_VIEW + arguments.images)
    ]
    done = {(result["view"], result["output"]): result for result in known}
    engine = build_engine(MODEL_FILE, arguments.device, SHAPE, precision="ieee")
    for view, output in tqdm([each for each in wanted if each not in done], desc="images"):
        done[view, output] = measure(engine, view, output, arguments.reference_steps)
        with file.open("a") as lines:
            lines.write(json.dumps(done[view, output]) + "\n")
    tables = [table([done[each] for each in wanted if each[1] == output], output) for output in arguments.outputs]
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine(arguments.device).items())
    report = "\n\n".join([machine, *tables]) + "\n"
    (arguments.folder / "report.md").write_text(report)
    print(report, end="")


if __name__ == "__main__":
    main()
