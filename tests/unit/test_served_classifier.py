"""Networks of any source become modules that TorchScript can compile, split behind what is affine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classifier_loading import check_classifier, check_gradients, load_classifier
from classifier_network import Network
from own_networks import Flat, Grouped, Tiny, seeded
from torch import Tensor, nn

from tools.torchscript.exported_graph import TracingError, trace
from tools.torchscript.served_classifier import (
    DiscreteGradientClassifier,
    HoistableClassifier,
    PlainClassifier,
    ScriptingError,
    ServedClassifier,
    build_served,
    script,
    verify,
)

SHAPE = (3, 32, 32)


class Patches(nn.Module):
    """A stem of patches, a class token and places, all affine; then one layer of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, stride=8)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 17, 6))
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(tokens.shape[0], -1, -1), tokens), dim=1) + self.places
        logits: Tensor = self.last(nn.functional.gelu(self.first(tokens)).mean(1))
        return logits


class InPlace(Tiny):
    """Writes into its activations, and reads them by a view."""

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.norm(self.conv(pixels))
        features += 0.1
        nn.functional.relu(features, inplace=True)
        logits: Tensor = self.head(features.view(features.size(0), 8, -1).mean(2))
        return logits


class Views(nn.Module):
    """Reads its activations by a view that needs them contiguous, and writes into them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8 * 8 * 8, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        features = nn.functional.relu(self.conv(pixels), inplace=True)
        logits: Tensor = self.head(features.view(features.size(0), -1))
        return logits


class BranchingViews(Views):
    """The same, with a decision that `torch.export` cannot follow."""

    def forward(self, pixels: Tensor) -> Tensor:
        features = nn.functional.relu(self.conv(pixels), inplace=True)
        if bool(features.sum() > 1e9):
            features = -features
        logits: Tensor = self.head(features.view(features.size(0), -1))
        return logits


class Branching(Tiny):
    """Decides by a value, which `torch.export` cannot follow and TorchScript can."""

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.conv(pixels)
        if bool(features.sum() > 1e9):
            features = -features
        logits: Tensor = self.head(features.relu().mean((2, 3)))
        return logits


class Detached(Tiny):
    """Has only half of the gradients of its activations."""

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.norm(self.conv(pixels))
        logits: Tensor = self.head((features + features.detach()).relu().mean((2, 3)))
        return logits


class Doubled(Tiny):
    """The same values with all of their gradients."""

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.norm(self.conv(pixels))
        logits: Tensor = self.head((features + features).relu().mean((2, 3)))
        return logits


class Curved(Tiny):
    """Begins with a function that is not affine."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels.sigmoid())


class Channels(Tiny):
    """Begins with an operator of several values, and puts them together in another order."""

    def forward(self, pixels: Tensor) -> Tensor:
        red, green, blue = pixels.float().chunk(3, dim=1)
        return super().forward(1 - torch.cat((blue, green, red), dim=1))


class Alone(Tiny):
    """Answers otherwise where an image comes alone."""

    def forward(self, pixels: Tensor) -> Tensor:
        logits = super().forward(pixels)
        return 2 * logits if pixels.shape[0] == 1 else logits


CASES: dict[str, tuple[Callable[[], nn.Module], type[ServedClassifier], str]] = {
    "convolutions": (Tiny, DiscreteGradientClassifier, ""),
    "a perceptron": (Flat, DiscreteGradientClassifier, ""),
    "patches": (Patches, DiscreteGradientClassifier, ""),
    "in place": (InPlace, DiscreteGradientClassifier, ""),
    "group normalisation": (
        Grouped,
        HoistableClassifier,
        "no discrete gradient of aten.group_norm.default is known",
    ),
    "branches": (Branching, PlainClassifier, "torch.export cannot read it"),
    "no affine beginning": (Curved, DiscreteGradientClassifier, ""),
    "several values": (Channels, DiscreteGradientClassifier, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_written_in_the_fastest_form_that_it_allows(tmp_path: Path, name: str) -> None:
    make, kind, limitation = CASES[name]
    network = seeded(make())
    served = build_served(network, SHAPE)
    assert type(served) is kind
    assert served.limitation.startswith(limitation)
    assert bool(served.limitation) == bool(limitation)
    written, difference = script(network, SHAPE, tmp_path / "model.pt")
    assert difference <= 1e-5
    assert type(written) is kind
    loaded, pixels = torch.jit.load(str(tmp_path / "model.pt")), torch.randn(3, *SHAPE)
    assert loaded.limitation == served.limitation
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels)[0], network(pixels), rtol=1e-4, atol=1e-6)


def test_the_stem_is_all_that_is_affine() -> None:
    served, pixels = build_served(seeded(Patches()), SHAPE), torch.randn(2, *SHAPE)
    assert isinstance(served, HoistableClassifier)
    # Patches, class token and places, and the first layer of the tokens.
    assert served.stem(pixels).shape == (2, 17, 6)
    targets = [str(node.target) for node in torch.fx.symbolic_trace(served.stem_layers).graph.nodes]
    assert any("linear" in target for target in targets)
    assert not any("gelu" in target for target in targets)


def test_torchscript_is_served_as_it_is(tmp_path: Path) -> None:
    network = torch.jit.script(seeded(Tiny()))
    served = build_served(network, SHAPE)
    assert isinstance(served, PlainClassifier)
    assert served.limitation == "it was a TorchScript file"
    assert script(network, SHAPE, tmp_path / "model.pt")[1] <= 1e-6


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        (Views(), DiscreteGradientClassifier),
        (torch.jit.script(Views()), PlainClassifier),
        (torch.jit.trace(Views(), torch.zeros(2, *SHAPE)), PlainClassifier),
        (BranchingViews(), PlainClassifier),
    ],
    ids=["eager", "scripted", "traced", "with a branch"],
)
def test_views_and_writes_in_place_are_served(tmp_path: Path, network: nn.Module, kind: type[ServedClassifier]) -> None:
    written, difference = script(seeded(network), SHAPE, tmp_path / "model.pt")
    assert type(written) is kind
    assert difference <= 1e-5
    module = load_classifier(tmp_path / "model.pt", torch.device("cpu"))
    assert check_classifier(module, tmp_path / "model.pt", SHAPE, torch.device("cpu")) == 10
    check_gradients(Network(module), tmp_path / "model.pt", SHAPE, torch.device("cpu"))


def test_writes_into_the_image_itself_are_refused(tmp_path: Path) -> None:
    class Shifting(Tiny):
        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = self.head(self.norm(self.conv(pixels.sub_(0.5))).relu().mean((2, 3)))
            return logits

    with pytest.raises(ScriptingError, match=r"cannot be run: .* in-place operation"):
        script(torch.jit.script(seeded(Shifting())), SHAPE, tmp_path / "model.pt")


def test_a_program_is_read_like_its_network(tmp_path: Path) -> None:
    network = seeded(Tiny())
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(
        torch.export.export(network, (torch.zeros(2, *SHAPE),), dynamic_shapes=dynamic), tmp_path / "n.pt2"
    )
    program = torch.export.load(tmp_path / "n.pt2").module()
    served = build_served(program, SHAPE)
    assert isinstance(served, DiscreteGradientClassifier)
    assert script(program, SHAPE, tmp_path / "model.pt")[1] <= 1e-5


def test_batch_normalisation_is_folded_and_weights_are_copies() -> None:
    network = Tiny()
    seeded(network)
    graph = trace(network, SHAPE)
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    before = network.conv.weight.clone()
    for weight in graph.parameters():
        weight.zero_()
    assert torch.equal(network.conv.weight, before)


def test_what_fixes_the_number_of_images_is_named() -> None:
    class Counting(Tiny):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels) + torch.zeros(len(pixels), 10)

    with pytest.raises(TracingError, match=r"its code fixes the batch size: use images\.shape\[0\]"):
        trace(seeded(Counting()), SHAPE)


def test_a_file_that_differs_is_refused(tmp_path: Path) -> None:
    network = Tiny()
    seeded(network)
    torch.jit.script(build_served(network, SHAPE)).save(str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert verify(loaded, network, SHAPE) <= 1e-5
    with torch.no_grad():
        network.head.weight.mul_(1.01)
    with pytest.raises(ScriptingError, match="the exported logits of one image differ from the eager model"):
        verify(loaded, network, SHAPE)


def test_gradients_are_compared_too() -> None:
    network = seeded(Detached())
    served = torch.jit.script(build_served(network, SHAPE))
    assert verify(served, network, SHAPE) <= 1e-5
    with pytest.raises(ScriptingError, match="the exported gradients differ"):
        verify(served, seeded(Doubled()), SHAPE)


def test_what_a_faster_form_gets_wrong_is_written_in_a_slower_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discrete gradients that do not add up are left out, and the file says why."""

    def wrong(self: DiscreteGradientClassifier, features: Tensor, paired: Tensor) -> Tensor:
        return 1.5 * self.tail_layers(features, paired)

    monkeypatch.setattr(DiscreteGradientClassifier, "mean_slope_tail", torch.jit.export(wrong))
    network = seeded(Tiny())
    written, _ = script(network, SHAPE, tmp_path / "model.pt")
    assert type(written) is HoistableClassifier
    assert "the faster form failed, the exported mean_slope_tail differ" in written.limitation


def test_one_image_is_compared_too(tmp_path: Path) -> None:
    with pytest.raises(ScriptingError, match="the exported logits of one image differ from the eager model"):
        script(seeded(Alone()), SHAPE, tmp_path / "model.pt")
