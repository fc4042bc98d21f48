"""Gradients along a path and their integral, without the engine's rows and rules: the reference for both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution_engine import AttributionEngine
from torch import Tensor

EXPLAINED_OUTPUTS = ("logit", "probability")


def integrands(engine: AttributionEngine, image: Tensor, target: int, nodes: Tensor) -> Iterator[dict[str, Tensor]]:
    """The integrand of Integrated Gradients from the zero baseline at ``nodes`` of the path, chunk by chunk.

    Args:
        engine: of the network; its ``max_rows`` bounds a chunk.
        image: [channels, height, width].
        target: class whose logit and probability are explained.
        nodes: places on [0, 1], float64 [n].

    Yields:
        For each output, gradients times the image at the nodes of a chunk, [m, channels, height, width].
    """
    images = image[None]
    for by_output in _feature_gradients(engine, image, target, nodes):
        yield {
            name: engine.network.transposed_stem(gradients, images.expand(len(gradients), *image.shape)) * image
            for name, gradients in by_output.items()
        }


@torch.no_grad()
def integrate(engine: AttributionEngine, image: Tensor, target: int, points: int) -> dict[str, Tensor]:
    """The integral for each output, by a midpoint rule added up in float64.

    Returns:
        Output -> float64 [channels, height, width].
    """
    nodes = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    totals: dict[str, Tensor] = {}
    for by_output in _feature_gradients(engine, image, target, nodes):
        for name, gradients in by_output.items():
            totals[name] = totals.get(name, 0) + gradients.double().sum(dim=0, keepdim=True)
    return {
        name: (engine.network.transposed_stem((total / points).to(image.dtype), image[None])[0] * image).double()
        for name, total in totals.items()
    }


def _feature_gradients(
    engine: AttributionEngine, image: Tensor, target: int, nodes: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Gradients behind the stem, in the network's own precision; both outputs share a forward pass."""
    network = engine.network
    module: Any = network.module  # a scripted module has the methods that were scripted
    with torch.no_grad():
        start, end = network.stem(torch.stack((torch.zeros_like(image), image))).double().split(1)
    for chunk in nodes.to(image.device).split(engine.max_rows):
        features = torch.lerp(start, end, chunk.view(-1, *[1] * (start.dim() - 1))).to(image.dtype).requires_grad_()
        with torch.enable_grad(), torch.jit.optimized_execution(False):
            logits = module.tail(features) if network.hoists else network(features)
            scores = {"logit": logits, "probability": logits.softmax(dim=1)}
            sums = {name: score[:, target].sum() for name, score in scores.items()}
        yield {name: torch.autograd.grad(total, features, retain_graph=True)[0] for name, total in sums.items()}


def load_or_integrate(
    file: Path, engine: AttributionEngine, image: Tensor, target: int, points: int
) -> dict[str, Tensor]:
    """``integrate``, kept in a file (.npz); its name must differ between networks, points and images."""
    if not file.is_file():
        integrals = integrate(engine, image, target, points)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part.npz")
        np.savez(unfinished, **{name: value.cpu().numpy() for name, value in integrals.items()})
        unfinished.replace(file)
    with np.load(file) as kept:
        return {name: torch.from_numpy(kept[name]).to(image.device) for name in EXPLAINED_OUTPUTS}
