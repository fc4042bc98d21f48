"""What is checked of the classifier's file at start-up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from classifier_loading import ClassifierError, check_classifier, check_gradients, load_classifier
from classifier_network import Network
from conftest import relative_distance
from own_networks import Swapped, Tiny, TwoOutputs, seeded
from torch import Tensor, nn

from tools.torchscript.served_classifier import build_served

CPU = torch.device("cpu")
SHAPE = (3, 32, 32)


class Wrapped(nn.Module):
    """(logits, probabilities) of a network whose logits are scaled, or cut off from its input."""

    def __init__(self, scale: float, is_detached: bool = False) -> None:
        super().__init__()
        self.network = seeded(Tiny(5))
        self.scale, self.is_detached = scale, is_detached

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.scale * self.network(pixels.detach() if self.is_detached else pixels)
        return logits, logits.softmax(dim=1)


class Bad(nn.Module):
    """Two outputs of wrong shapes."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels.mean((1, 2, 3)), pixels.mean((1, 2, 3))


class Split(nn.Module):
    """Has a stem and a tail, and something of its own between them."""

    def __init__(self, stem: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.stem_layers, self.between = stem, between
        self.tail_layers = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.tail(self.between(self.stem(pixels)))
        return logits, logits.softmax(dim=1)

    @torch.jit.export
    def stem(self, pixels: Tensor) -> Tensor:
        return self.stem_layers(pixels)

    @torch.jit.export
    def tail(self, features: Tensor) -> Tensor:
        return self.tail_layers(features)


def scripted(module: nn.Module) -> Callable[[Path], None]:
    return lambda file: torch.jit.script(module).save(str(file))


def truncated(file: Path) -> None:
    scripted(seeded(TwoOutputs(5)))(file)
    file.write_bytes(file.read_bytes()[:-1000])


BAD = {
    "missing": (lambda file: None, "is missing; python -m tools.export writes it"),
    "truncated": (truncated, "is not a TorchScript file that torch"),
    "an image": (lambda file: file.write_bytes(b"\xff\xd8\xff\xe0 JFIF"), "is not a TorchScript file that torch"),
    "one output": (scripted(seeded(Tiny(5))), "returns one output instead of (logits, probabilities)"),
    "swapped outputs": (scripted(seeded(Swapped(5))), "is not the softmax of its first"),
    "another size": (scripted(nn.Sequential(nn.Flatten(), nn.Linear(12, 5))), "fails on images of 3 x 32 x 32"),
    "one channel": (scripted(seeded(TwoOutputs(5, channels=1))), "fails on images of 3 x 32 x 32"),
    "wrong shapes": (scripted(Bad()), "returns [2] and [2] for 2 images"),
    "not finite": (scripted(Wrapped(float("inf"))), "logits that are not finite"),
    "no slopes": (scripted(Wrapped(0.0)), "are zero everywhere, so there is nothing to explain"),
    "a stem that is not affine": (
        scripted(seeded(Split(nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU()), nn.Identity()))),
        "cannot be used: its stem is not affine",
    ),
    "something between stem and tail": (
        scripted(seeded(Split(nn.Conv2d(3, 4, 3, stride=4), nn.Sigmoid()))),
        "cannot be used: it does not return tail(stem(images))",
    ),
    "detached": (scripted(Wrapped(1.0, is_detached=True)), "has no gradients"),
}


def load_and_check(file: Path) -> None:
    """What `integrated_gradients` does."""
    module = load_classifier(file, CPU)
    check_classifier(module, file, SHAPE, CPU)
    check_gradients(Network(module), file, SHAPE, CPU)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_explained_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    write, expected = BAD[name]
    file = tmp_path / "model.pt"
    write(file)
    with pytest.raises(ClassifierError) as refusal:
        load_and_check(file)
    message = str(refusal.value)
    assert str(file) in message
    assert expected in message
    assert "\n" not in message
    assert len(message) <= len(str(file)) + 300


def test_the_number_of_classes_is_found(tmp_path: Path) -> None:
    scripted(seeded(TwoOutputs(7)))(tmp_path / "model.pt")
    module = load_classifier(tmp_path / "model.pt", CPU)
    assert check_classifier(module, tmp_path / "model.pt", SHAPE, CPU) == 7


def test_an_exported_program_is_explained_like_torchscript(tmp_path: Path) -> None:
    network = build_served(seeded(Tiny(5)), SHAPE)
    scripted(network)(tmp_path / "model.pt")
    pixels = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(network, (pixels,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "model.pt2")
    image, jobs = pixels[0], []
    for name in ("model.pt", "model.pt2"):
        module = load_classifier(tmp_path / name, CPU)
        assert check_classifier(module, tmp_path / name, SHAPE, CPU) == 5
        engine = AttributionEngine(module, max_rows=4)
        methods = ("gausslegendre", "riemann_trapezoid")
        jobs.append(engine.explain([Job(image, torch.zeros_like(image), 3, 6, method) for method in methods]))
    for own, other in zip(*jobs):
        # The same float32 sums in another order.
        assert relative_distance(own.attributions, other.attributions) <= 1e-5
