"""Find where a network's paths need their nodes: ``python -m tools.calibrate [--images FOLDER]``.

Takes the gradients of both outputs at evenly spaced points of the paths to some images, and writes beside the served
network, with its checksum, how densely nodes belong where, and how errors fall with their number. ``method=calibrated``
places its nodes by the one, ``tolerance`` and ``deadline_ms`` plan and estimate with the other. Without a folder the
images are crops of photographs that installed packages carry or, for the network of drawn shapes, its generator's
calibration split; no rule is judged on any of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from engine_loading import build_engine
from error_law import ErrorLaw
from image_decoding import ImageLimits, load_pixels, open_image
from image_structure import ImageError
from path_density import FILE_NAME, PathDensity
from richardson_rule import COARSE_SHARE
from torch import Tensor
from tqdm import tqdm

from tools.evaluation.integrals import EXPLAINED_OUTPUTS, integrands
from tools.evaluation.measuring import SHAPE, default_device, explain
from tools.export import NETWORKS, Preprocessing, ensure_exported, read_manifest, repository_with
from tools.imagenet.photographs import CALIBRATION, crops, view
from tools.paths import MODEL_REPOSITORY
from tools.shapes.dataset import view_pixels

INTERVALS = 64
# The density is the gradients' mean rate of change to one of these powers. If errors of segments do not cancel and grow
# as the square of their length, 1/2 is best; if they are random and grow as the length, 1 is.
EXPONENTS = (0.5, 0.65, 0.8, 0.95)
# Steps at which the powers are compared, and by what.
COMPARED_STEPS, REFERENCE_STEPS, REFERENCE_EXPONENT = 16, 96, 0.65
# Numbers of steps that tell how errors fall; those whose quarter is among them tell what the difference stands for.
LAW_STEPS = (2, 4, 8, 16, 32)
LAW_FROM = 4
# Of images: the expected error, and the margin of an estimate.
SCALE_PERCENTILE, MARGIN_PERCENTILE = 90, 95


def gradient_change(engine: AttributionEngine, image: Tensor, intervals: int = INTERVALS) -> dict[str, Tensor]:
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


def attributions(engine: AttributionEngine, image: Tensor, output: str, steps: Sequence[int]) -> list[Tensor]:
    """Of the predicted class, with so many steps by the engine's density each."""
    with torch.no_grad():
        target = int(engine.network(image[None]).argmax())
    job = Job(image, torch.zeros_like(image), target, method="calibrated", probability=output == "probability")
    found = explain(engine, [replace(job, n_steps=count) for count in steps], with_delta=False)
    return [each.attributions for each in found]


def with_exponent(changes: dict[str, Tensor], exponent: float) -> PathDensity:
    """Nodes by the rate of change to a power; for both outputs."""
    return PathDensity({name: change**exponent for name, change in changes.items()}, {})


def fit_output(
    engine: AttributionEngine, images: Sequence[Tensor], changes: dict[str, Tensor], output: str
) -> tuple[float, ErrorLaw]:
    """The power of the rate of change that makes the smallest errors, and how errors fall then. Changes the engine.

    Errors are relative, to an attribution of many steps.
    """
    references: list[Tensor] = []
    compared: dict[float, list[float]] = {exponent: [] for exponent in EXPONENTS}
    for image in tqdm(images, desc=f"density, {output}"):
        engine.density = with_exponent(changes, REFERENCE_EXPONENT)
        references += attributions(engine, image, output, [REFERENCE_STEPS])
        for exponent, errors in compared.items():
            engine.density = with_exponent(changes, exponent)
            (compared_with,) = attributions(engine, image, output, [COMPARED_STEPS])
            errors.append(((compared_with - references[-1]).norm() / references[-1].norm()).item())
    exponent = min(EXPONENTS, key=lambda each: float(np.median(compared[each])))
    engine.density = with_exponent(changes, exponent)
    all_errors: list[list[float]] = []
    differences: list[dict[int, float]] = []
    for image, reference in zip(tqdm(images, desc=f"errors, {output}"), references):
        found = dict(zip(LAW_STEPS, attributions(engine, image, output, LAW_STEPS)))
        all_errors.append([((each - reference).norm() / reference.norm()).item() for each in found.values()])
        differences.append(
            {
                count: ((each - found[round(COARSE_SHARE * count)]).norm() / reference.norm()).item()
                for count, each in found.items()
                if round(COARSE_SHARE * count) in found
            }
        )
    return exponent, fit_law(np.array(all_errors), differences)


def fit_law(errors: np.ndarray, differences: list[dict[int, float]]) -> ErrorLaw:
    """How errors fall.

    Args:
        errors: relative [images, numbers of steps], at ``LAW_STEPS``.
        differences: for each image, number of steps -> relative difference to a quarter of them.
    """
    counts = np.array(LAW_STEPS)
    fitted = counts >= LAW_FROM
    slope, _ = np.polyfit(np.log(counts[fitted]), np.log(np.median(errors[:, fitted], axis=0)), 1)
    scale = np.percentile(errors[:, fitted] * counts[fitted] ** -slope, SCALE_PERCENTILE)
    law = ErrorLaw(float(scale), float(-slope), 1.0)
    stands_for = [
        errors[image, LAW_STEPS.index(count)] / (law.share(round(COARSE_SHARE * count), count) * difference)
        for image, by_count in enumerate(differences)
        for count, difference in by_count.items()
    ]
    return replace(law, margin=float(np.percentile(stands_for, MARGIN_PERCENTILE)))


def load_folder(folder: Path, count: int, preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Images of a folder as `preprocess` shows them to the classifier, [3, 224, 224]; others are reported and left."""
    taken, limits = 0, ImageLimits()
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or taken == count:
            continue
        try:
            pixels = load_pixels(open_image(file.read_bytes(), limits), mean, std, limits)
        except ImageError as error:
            print(f"left out: {file}: {error}", file=sys.stderr)
            continue
        taken += 1
        yield pixels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--images", type=Path, help="a folder of JPEG, PNG and WebP files (default: see above)")
    parser.add_argument("--count", type=int, default=32, help="images to take (default: %(default)s)")
    served = parser.add_mutually_exclusive_group()
    served.add_argument("--network", choices=NETWORKS, help="one of this repository's instead of what is served")
    served.add_argument("--repository", type=Path, default=MODEL_REPOSITORY)
    parser.add_argument("--out", type=Path, help=f"default: {FILE_NAME} beside the network")
    arguments = parser.parse_args()
    repository = repository_with(arguments.network) if arguments.network else arguments.repository
    ensure_exported(repository, arguments.network or os.environ.get("NETWORK"))
    manifest = read_manifest(repository) or {}
    preprocessing = Preprocessing(**manifest.get("preprocessing", {}))
    file = repository / "classifier" / "1" / "model.pt"
    engine = build_engine(file, arguments.device, SHAPE, precision="ieee")
    if arguments.images is not None:
        images, source = list(load_folder(arguments.images, arguments.count, preprocessing)), arguments.images.name
    elif manifest.get("network") == "shapes":
        images = [view_pixels("calibration", [index])[0] for index in range(arguments.count)]
        source = "the shapes generator's calibration split"
    else:
        images = [view(image, preprocessing) for _, image in crops(CALIBRATION, arguments.count)]
        source = "crops of " + ", ".join(photograph.name for photograph in CALIBRATION)
    if not images:
        sys.exit(f"calibrate: there is no image in {arguments.images}")
    images = [image.to(arguments.device) for image in images]
    found = [gradient_change(engine, image) for image in tqdm(images, desc="changes")]
    changes = {name: torch.stack([each[name] for each in found]).mean(dim=0) for name in EXPLAINED_OUTPUTS}
    fits = {name: fit_output(engine, images, changes, name) for name in EXPLAINED_OUTPUTS}
    content = {
        "model_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "weights_sha256": manifest.get("weights_sha256"),
        "images": f"{len(images)} of {source}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "torchvision")},
        "exponent": {name: exponent for name, (exponent, _) in fits.items()},
        "error_law": {
            name: {key: round(value, 3) for key, value in vars(law).items()} for name, (_, law) in fits.items()
        },
        "density": {
            name: [float(f"{value:.4g}") for value in (changes[name] ** exponent).tolist()]
            for name, (exponent, _) in fits.items()
        },
    }
    out = arguments.out or file.with_name(FILE_NAME)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({"exponent": content["exponent"], "error_law": content["error_law"]}))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
