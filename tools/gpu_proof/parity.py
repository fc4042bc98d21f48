"""Correctness: `ieee` against Captum in float64, CUDA graphs against eager passes, batches against single requests."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import captum.attr
import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from classifier_loading import load_classifier
from engine_loading import build_engine
from path_baselines import Baselines
from torch import Tensor, nn

from tools.bench.architectures import held_out, load_network
from tools.evaluation.measuring import default_device, explain, relative_distance
from tools.gpu_proof.engine import graphs
from tools.gpu_proof.part import Record
from tools.torchscript.served_classifier import script

# The second has random weights; its layers are those of EfficientNet-Lite0.
NETWORKS = ("shapes", "timm:efficientnet_lite0")
METHODS = ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid")
SETTINGS = [
    *((method, "zero", False) for method in METHODS),
    *(("gausslegendre", baseline, False) for baseline in ("black", "white", "gray", "blur")),
    ("gausslegendre", "zero", True),
    ("riemann_trapezoid", "blur", True),
]
STEPS, IMAGES = 16, 4
DEVICE = default_device()


class Case(NamedTuple):
    """A network in each form that is compared, and images for it."""

    eager: nn.Module
    exact: nn.Module  # float64
    engine: AttributionEngine
    launched: AttributionEngine  # without CUDA graphs
    images: list[Tensor]
    baselines: Baselines


@cache
def case(network: str) -> Case:
    source = load_network(network)
    shape = source.preprocessing.input_shape
    images = held_out(network, source, IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        script(copy.deepcopy(source.module), shape, file)
        engine = build_engine(load_classifier(file, DEVICE), DEVICE, shape, precision="ieee")
    launched = AttributionEngine(engine.network, max_rows=engine.max_rows)
    eager = source.module.eval().to(DEVICE)
    baselines = Baselines(source.preprocessing.mean, source.preprocessing.std)
    exact = copy.deepcopy(eager).double()
    return Case(eager, exact, engine, launched, [image.to(DEVICE) for image in images], baselines)


def captum_attribution(model: nn.Module, job: Job) -> Tensor:
    """Captum's attribution for a job, in the dtype of its image."""
    function = (lambda images: model(images).softmax(dim=1)) if job.probability else model
    attributions = captum.attr.IntegratedGradients(function).attribute(
        job.image[None],
        baselines=job.baseline[None],
        target=job.target,
        n_steps=job.n_steps,
        method=job.method,
        internal_batch_size=8,
    )
    return attributions[0].detach()


def compare_with_captum(record: Record) -> None:
    """Distances to Captum in float64 of the engine, and of Captum itself in float32; the gate is twice as much."""
    for network in NETWORKS:
        eager, exact, engine, _, images, baselines = case(network)
        rows: dict[str, Any] = {}
        for index, (method, baseline, probability) in enumerate(SETTINGS[:2] if record.quick else SETTINGS):
            image = images[index % IMAGES]
            with torch.no_grad():
                target = int(eager(image[None]).argmax())
            job = Job(image, baselines.make(baseline, image), target, STEPS, method, probability=probability)
            reference = captum_attribution(exact, replace(job, image=image.double(), baseline=job.baseline.double()))
            distances = {
                "engine": explain(engine, [job])[0].attributions,
                "captum": captum_attribution(eager, job),
            }
            row: dict[str, Any] = {name: relative_distance(each, reference) for name, each in distances.items()}
            row["holds"] = row["engine"] <= 2 * row["captum"]
            rows[f"{method}, {baseline}, {'probability' if probability else 'logit'}"] = row
        record[f"captum, {network}"] = rows


def unlike_jobs(network: str) -> list[Job]:
    """Jobs that differ in all that jobs may differ in."""
    _, _, _, _, images, baselines = case(network)
    jobs = []
    for index, n_steps in enumerate((5, 20, 2, 33, 8, 64)):
        image = images[index % IMAGES]
        name = ("zero", "black", "white", "gray", "blur", "zero")[index]
        start = baselines.make(name, image)
        method = METHODS[index % len(METHODS)]
        jobs.append(Job(image, start, index, n_steps, method, probability=index % 2 == 1))
    image = images[0]
    return [*jobs, Job(image, torch.zeros_like(image), 1, 200, tolerance=0.05)]


def compare_graphs(record: Record) -> None:
    """Distances of replayed graphs to eager passes, each twice: the second replays what the first captured."""
    for network in NETWORKS:
        engine, launched, jobs = case(network).engine, case(network).launched, unlike_jobs(network)
        expected = explain(launched, jobs)
        distances = [
            [
                relative_distance(one.attributions, other.attributions)
                for one, other in zip(explain(engine, jobs), expected)
            ]
            for _ in range(2)
        ]
        record[f"graphs, {network}"] = {"distances": distances, "captured": graphs(engine)}


def compare_batches(record: Record) -> None:
    """Distances of jobs that were explained together to each alone."""
    for network in NETWORKS:
        engine, jobs = case(network).engine, unlike_jobs(network)
        together = explain(engine, jobs)
        alone = [explain(engine, [job])[0] for job in jobs]
        record[f"batches, {network}"] = {
            "distances": [
                relative_distance(one.attributions, other.attributions) for one, other in zip(together, alone)
            ],
            "steps": [(one.n_steps, other.n_steps) for one, other in zip(together, alone)],
        }


MEASURES = {"captum": compare_with_captum, "graphs": compare_graphs, "batches": compare_batches}
