"""Helpers of benchmarks and reports: a network's engine, a description of the machine, interleaved runs.

Networks are those of ``tools.classifiers.loading.NETWORKS``, independent of what `model_repository` serves.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job
from classifier_files import Preprocessing
from classifier_loading import load_classifier
from engine_loading import build_engine
from path_density import FILE_NAME, PathDensity
from torch import Tensor

from tools.export import read_manifest, repository_with
from tools.imagenet.photographs import HELD_OUT, crops, view
from tools.shapes.dataset import view_pixels


def model_file(network: str = "shapes") -> Path:
    """A network's TorchScript file, exported if it is missing or old."""
    return repository_with(network) / "classifier" / "1" / "model.pt"


def load_manifest(network: str = "shapes") -> dict[str, Any]:
    """The manifest of that file."""
    manifest = read_manifest(repository_with(network))
    assert manifest is not None  # `repository_with` has exported it
    return manifest


def held_out_images(network: str, count: int, first: int = 0) -> dict[str, Tensor]:
    """Images that no training and no calibration saw, by name, normalised, float32 [channels, height, width].

    Args:
        network: ``shapes`` has drawn scenes, from the one of number ``first``; others have crops of photographs.
        count: how many.
    """
    if network == "shapes":
        return {str(index): view_pixels("test", [index])[0] for index in range(first, first + count)}
    preprocessing = Preprocessing.from_manifest(load_manifest(network)["preprocessing"])
    return {name: view(image, preprocessing) for name, image in crops(HELD_OUT, count)}


def load_engine(device: torch.device, precision: str, max_rows: int = 0, network: str = "shapes") -> AttributionEngine:
    """The engine as `integrated_gradients` loads it, with the network's calibration."""
    file, manifest = model_file(network), load_manifest(network)
    density = PathDensity.load(file.with_name(FILE_NAME), manifest["model_sha256"])
    shape = Preprocessing.from_manifest(manifest["preprocessing"]).input_shape
    return build_engine(load_classifier(file, device), device, shape, max_rows, precision, density, winograd=True)


def explain(engine: AttributionEngine, jobs: Sequence[Job], **options: Any) -> list[Explanation]:
    """Explanations of jobs that are not cancelled."""
    explanations = [answer for answer in engine.explain(jobs, **options) if answer is not None]
    assert len(explanations) == len(jobs)
    return explanations


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a run; it must end by copying its result to the host, which waits for a GPU."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, always_warm: Collection[str] = (), is_warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each run by name; runs take turns, after one warm-up of each.

    Args:
        runs: what to time, by name.
        repeats: timed runs of each.
        always_warm: runs before each of which an untimed one comes.
        is_warm: leave the first warm-up out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(0 if is_warm else -1, repeats):
        for name, run in runs.items():
            if name in always_warm and repeat >= 0:
                run()
            duration = timed(run)
            if repeat >= 0:
                seconds[name].append(duration)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def distribution(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Number, percentiles and maximum of values."""
    if not len(values):
        return {"count": 0}
    percentiles = {f"p{part}": float(np.percentile(values, part)) for part in (50, 95, 99)}
    return {"count": len(values), **percentiles, "most": float(max(values))}


def rounded(value: Any) -> Any:
    """The same with numbers rounded to six digits."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def relative_distance(values: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    return ((values - reference).norm() / reference.norm()).item()


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware and versions, by default for the device that a server here would use."""
    device = device or default_device()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    hardware = f"{os.cpu_count()} cores of {name}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)} beside {hardware}"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "captum")},
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """The result of ``describe_machine`` in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def write_report(report: Mapping[str, Any], markdown: str, file: Path) -> None:
    """Write a report as JSON and print it as Markdown, with the machine before it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounded(report), indent=1) + "\n")
    print(machine_line(report["machine"]))
    print(markdown)
    print(f"wrote {file}")
