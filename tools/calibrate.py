"""Find where a network's paths need their nodes: ``python -m tools.calibrate [--images FOLDER]``.

Takes the gradients of both outputs at evenly spaced points of the paths to some images, and writes how much the
attribution's integrand changes from point to point, on average, beside the served network, with its checksum, and what
error to expect. ``method=calibrated`` places its nodes by the one, ``tolerance`` plans with the other. Without a folder
the images are the demo generator's calibration split, which no network was trained and no rule is judged on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from attribution_engine import IntegratedGradients, Job
from engine_loading import build_engine
from image_decoding import ImageLimits, load_pixels, open_image
from image_structure import ImageError
from path_density import FILE_NAME, PathDensity
from path_rules import ERROR_ORDER
from torch import Tensor
from tqdm import tqdm

from tools.export import PREPROCESSING, ensure_exported
from tools.integrals import EXPLAINED_OUTPUTS, integrands
from tools.measuring import SHAPE, default_device
from tools.paths import MODEL_REPOSITORY
from tools.shapes.dataset import view_pixels

INTERVALS = 64
SCALE_STEPS = (4, 8)


def gradient_change(engine: IntegratedGradients, image: Tensor, intervals: int = INTERVALS) -> dict[str, Tensor]:
    """For each output, the changes of the integrand from one of ``intervals`` + 1 even points to the next.

    Args:
        engine: of the network.
        image: [3, height, width].

    Returns:
        Norms in pixel space relative to that of the attribution, float64 [intervals].
    """
    with torch.no_grad():
        target = int(engine.network(image[None]).argmax())
    nodes = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    last: dict[str, Tensor] = {}
    totals = {name: torch.zeros_like(image) for name in EXPLAINED_OUTPUTS}
    changes: dict[str, list[Tensor]] = {name: [] for name in EXPLAINED_OUTPUTS}
    for found in integrands(engine, image, target, nodes):
        for name, values in found.items():
            together = torch.cat((last[name], values)) if name in last else values
            changes[name].append(together.diff(dim=0).flatten(1).norm(dim=1))
            last[name] = values[-1:]
            totals[name] += values.sum(dim=0)
    return {
        name: torch.cat(changes[name]).double().cpu() / (totals[name] / len(nodes)).norm().item()
        for name in EXPLAINED_OUTPUTS
    }


def error_scale(engine: IntegratedGradients, image: Tensor) -> dict[str, float]:
    """For each output, what ``PathDensity.error_scale`` says of one image; the engine has the density already."""
    with torch.no_grad():
        target = int(engine.network(image[None]).argmax())
    found = {}
    for name in EXPLAINED_OUTPUTS:
        job = Job(image, torch.zeros_like(image), target, method="calibrated", probability=name == "probability")
        few, many = (engine.explain([replace(job, n_steps=n)], with_delta=False)[0].attributions for n in SCALE_STEPS)
        falls = SCALE_STEPS[0] ** -ERROR_ORDER - SCALE_STEPS[1] ** -ERROR_ORDER
        found[name] = ((many - few).norm() / many.norm()).item() / falls
    return found


def load_folder(folder: Path, count: int) -> Iterator[Tensor]:
    """Images of a folder as `preprocess` shows them to the classifier, [3, 224, 224]; others are reported and left."""
    taken, limits = 0, ImageLimits()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or taken == count:
            continue
        try:
            pixels = load_pixels(open_image(file.read_bytes(), limits), PREPROCESSING.mean, PREPROCESSING.std, limits)
        except ImageError as error:
            print(f"left out: {file}: {error}", file=sys.stderr)
            continue
        taken += 1
        yield pixels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--images", type=Path, help="a folder of JPEG, PNG and WebP files (default: drawn shapes)")
    parser.add_argument("--count", type=int, default=32, help="images to take (default: %(default)s)")
    parser.add_argument("--repository", type=Path, default=MODEL_REPOSITORY)
    parser.add_argument("--out", type=Path, help=f"default: {FILE_NAME} beside the served network")
    arguments = parser.parse_args()
    ensure_exported(arguments.repository)
    file = arguments.repository / "classifier" / "1" / "model.pt"
    engine = build_engine(file, arguments.device, SHAPE, precision="ieee")
    if arguments.images is None:
        images = [view_pixels("calibration", [index])[0] for index in range(arguments.count)]
        source = "the shapes generator's calibration split"
    else:
        images, source = list(load_folder(arguments.images, arguments.count)), arguments.images.name
    if not images:
        sys.exit(f"calibrate: there is no image in {arguments.images}")
    images = [image.to(arguments.device) for image in images]
    found = [gradient_change(engine, image) for image in tqdm(images, desc="density")]
    changes = {name: torch.stack([each[name] for each in found]).mean(dim=0) for name in EXPLAINED_OUTPUTS}
    engine.density = PathDensity(changes, PathDensity.unknown().error_scale)
    scales = [error_scale(engine, image) for image in tqdm(images, desc="errors")]
    manifest = file.with_name("manifest.json")
    content = {
        "model_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "weights_sha256": json.loads(manifest.read_text())["weights_sha256"] if manifest.is_file() else None,
        "images": f"{len(images)} of {source}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "torchvision")},
        "error_scale": {
            name: round(float(np.percentile([each[name] for each in scales], 90)), 3) for name in EXPLAINED_OUTPUTS
        },
        "gradient_change": {
            name: [float(f"{value:.4g}") for value in values.tolist()] for name, values in changes.items()
        },
    }
    out = arguments.out or file.with_name(FILE_NAME)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
