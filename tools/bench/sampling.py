"""Gradients against sampling: Captum's LIME and KernelSHAP over superpixels, on the same network and images.

For each map: the time of an image, deletion and insertion areas, and how much of the map lies on the drawn shape:
`python -m tools.bench.sampling`
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution_job import Job
from captum.attr import KernelShap, Lime
from skimage.segmentation import slic
from torch import Tensor
from tqdm import tqdm

from tools.classifiers.loading import load_source
from tools.evaluation.faithfulness import curves
from tools.evaluation.localisation import DILATION, dilate, peak_inside, share_inside
from tools.evaluation.measuring import default_device, describe_machine, explain, load_engine, write_report
from tools.paths import OUTPUTS
from tools.shapes.dataset import draw_view, view_pixels

# Held-out images that no other tool uses.
FIRST_VIEW = 2000
SUPERPIXELS = 50
SAMPLES = (200, 1000)
# Perturbed images of one forward pass.
PERTURBATIONS = 16
ENGINE_MAPS: dict[str, dict[str, Any]] = {
    "Integrated Gradients, 50 steps": {"n_steps": 50},
    "Integrated Gradients, calibrated, 16 steps": {"method": "calibrated", "n_steps": 16},
    "Integrated Gradients, tolerance 0.05": {"tolerance": 0.05, "n_steps": 200},
}


def superpixels(pixels: Tensor) -> Tensor:
    """Number of the superpixel of each pixel, int64 [1, height, width], of an image [3, height, width]."""
    image = pixels.permute(1, 2, 0).double().cpu().numpy()
    image = (image - image.min()) / (image.max() - image.min())
    return torch.from_numpy(slic(image, n_segments=SUPERPIXELS, start_label=0))[None].to(pixels.device)


class Maps:
    """Methods to explain an image, by name."""

    def __init__(self, device: torch.device, samples: tuple[int, ...]) -> None:
        self.engine = load_engine(device, "tf32")
        self.eager = load_source("shapes").module.to(device).eval()
        self.makers: dict[str, Callable[[Tensor, int], Tensor]] = {
            name: partial(self._gradients, options) for name, options in ENGINE_MAPS.items()
        }
        for name, method in (("LIME", Lime), ("KernelSHAP", KernelShap)):
            for count in samples:
                self.makers[f"{name}, {count} samples"] = partial(self._sampled, method, count)
        self.makers["random"] = lambda image, target: torch.rand(image.shape[1:])

    def _gradients(self, options: dict[str, Any], image: Tensor, target: int) -> Tensor:
        job = Job(image, torch.zeros_like(image), target, baseline_key="zero", **options)
        (explanation,) = explain(self.engine, [job])
        return explanation.attributions.sum(dim=0).cpu()

    @torch.no_grad()
    def _sampled(self, method: type, count: int, image: Tensor, target: int) -> Tensor:
        attributions = method(self.eager).attribute(
            image[None],
            target=target,
            feature_mask=superpixels(image)[None],
            n_samples=count,
            perturbations_per_eval=PERTURBATIONS,
        )
        return attributions[0, 0].cpu()  # the same in each channel


def measure(device: torch.device, images: int, samples: tuple[int, ...] = SAMPLES) -> dict[str, Any]:
    """Number of images and superpixels; for each map by name, lists of one value for each image."""
    torch.manual_seed(0)
    maps = Maps(device, samples)
    values: dict[str, dict[str, list[float]]] = {name: {} for name in maps.makers}
    for view in tqdm(range(FIRST_VIEW, FIRST_VIEW + images), desc="images"):
        image = view_pixels("test", [view])[0].to(device)
        with torch.no_grad():
            target = int(maps.engine.network(image[None]).argmax())
        mask = dilate(draw_view("test", view).mask, DILATION)
        for name, make in maps.makers.items():
            started = time.perf_counter()
            saliency = make(image, target)
            seconds = time.perf_counter() - started
            both = curves(maps.engine.network, image, saliency.to(device), target)
            array = saliency.numpy()
            for key, value in {
                "seconds": seconds,
                "deletion": both.deletion_area,
                "insertion": both.insertion_area,
                "top_share_inside": share_inside(array, mask),
                "peak_inside": float(peak_inside(array, mask)),
            }.items():
                values[name].setdefault(key, []).append(value)
    return {"images": images, "superpixels": SUPERPIXELS, "maps": values}


def table(measured: dict[str, Any]) -> str:
    """A Markdown table of the maps."""
    lines = [
        f"{measured['images']} held-out images, about {measured['superpixels']} superpixels (SLIC); means:",
        "",
        "| map | time, median | deletion area (low) | insertion area (high) | top 1 % on the shape | peak on it |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in measured["maps"].items():
        deletion, insertion, top, peak = (
            np.mean(values[key]) for key in ("deletion", "insertion", "top_share_inside", "peak_inside")
        )
        seconds = "" if name == "random" else f"{np.median(values['seconds']):.2f} s"
        lines.append(f"| {name} | {seconds} | {deletion:.3f} | {insertion:.3f} | {top:.1%} | {peak:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES))
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "sampling.json")
    arguments = parser.parse_args()
    report = {
        "command": " ".join(["python -m tools.bench.sampling", *sys.argv[1:]]),
        "machine": describe_machine(arguments.device),
        **measure(arguments.device, arguments.images, tuple(arguments.samples)),
    }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
