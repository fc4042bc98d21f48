"""Which weights can be exported, how they are loaded, and what is said of those that cannot be."""

import argparse
import os
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import own_networks
import pytest
import safetensors.torch
import torch
import torchvision
from own_networks import Flat, Noisy, Sequence, Swapped, Tiny, TwoOutputs, seeded
from torch import nn

from tools import export
from tools.classifiers import architectures
from tools.classifiers.checkpoint_files import WRAPPERS
from tools.classifiers.loading import load_source
from tools.classifiers.preprocessing import Overrides, of_timm, of_torchvision
from tools.classifiers.source import MESSAGE_CHARACTERS, DownloadError, ExportError

# After `tools`, which adds the models' folders to the path.
from classifier_files import Preprocessing  # isort: skip

TINY = "own_networks:tiny"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def resnet(classes=5, **options):
    return seeded(torchvision.models.resnet18(num_classes=classes, **options))


def mobilenet(classes=5):
    return seeded(torchvision.models.mobilenet_v3_small(num_classes=classes))


def with_module(network: nn.Module, slot: str, module: nn.Module) -> nn.Module:
    network.set_submodule(slot, module)
    return seeded(network)


def prefixed(prefix: str, network: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def export_program(network: nn.Module, file: Path, channels=3, side=32, batch=2) -> None:
    dynamic = ({0: torch.export.Dim.AUTO},) if batch > 1 else None
    program = torch.export.export(network, (torch.randn(batch, channels, side, side),), dynamic_shapes=dynamic)
    torch.export.save(program, file)


@dataclass
class Good:
    """A file that can be exported, and the network that it must become."""

    network: nn.Module
    held: Callable[[nn.Module], object] | None = None  # what torch.save writes; the state dict by default
    write: Callable[[nn.Module, Path], None] | None = None  # in place of torch.save
    architecture: str = TINY
    suffix: str = ".pt"
    size: tuple[str, ...] = ("32",)
    channels: int = 3
    labels: list[str] | None = None

    def written(self, folder: Path) -> str:
        file = folder / f"weights{self.suffix}"
        if self.write:
            self.write(self.network, file)
        else:
            torch.save(self.held(self.network) if self.held else self.network.state_dict(), file)
        return str(file)


def wrapped(*keys: str, **beside: object) -> Callable[[nn.Module], object]:
    """A checkpoint with the state dict under nested keys."""

    def held(network: nn.Module) -> object:
        inner: object = network.state_dict()
        for key in reversed(keys):
            inner = {"epoch": 3, key: inner, "optimizer": {"state": {}}}
        assert isinstance(inner, dict)
        return {**inner, **beside}

    return held


def under(*keys: str) -> Callable[[], Good]:
    return lambda: Good(seeded(Tiny(7)), wrapped(*keys), suffix=".ckpt")


def with_prefix(prefix: str) -> Callable[[], Good]:
    return lambda: Good(seeded(Tiny(7)), lambda network: prefixed(prefix, network))


GOOD = {
    "a state dict": lambda: Good(seeded(Tiny(7))),
    "two classes": lambda: Good(seeded(Tiny(2))),
    "21,843 classes": lambda: Good(seeded(Tiny(21_843))),
    "a state dict of torchvision": lambda: Good(resnet(), architecture="resnet18"),
    "an old format": lambda: Good(
        seeded(Tiny(7)), write=lambda n, f: torch.save(n.state_dict(), f, _use_new_zipfile_serialization=False)
    ),
    "half precision": lambda: Good(
        seeded(Tiny(7).half()).float(), lambda n: {name: t.half() for name, t in n.state_dict().items()}
    ),
    **{
        f"under {' and '.join(keys)}": under(*keys) for keys in (*((key,) for key in WRAPPERS), ("model", "state_dict"))
    },
    "a trainer's checkpoint": lambda: Good(
        seeded(Tiny(7)), wrapped("model", args=argparse.Namespace(lr=0.1)), suffix=".pth"
    ),
    "averaged weights": lambda: Good(
        seeded(Tiny(7)), lambda n: {"n_averaged": torch.tensor(4), **prefixed("module.", n)}
    ),
    **{
        f"with {prefix}": with_prefix(prefix)
        for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.")
    },
    "a network's own model.": lambda: Good(seeded(Flat(4)), architecture="own_networks:flat"),
    "a prefix before a network's own model.": lambda: Good(
        seeded(Flat(4)), lambda n: prefixed("module.", n), architecture="own_networks:flat"
    ),
    "safetensors": lambda: Good(
        seeded(Tiny(7)), write=lambda n, f: safetensors.torch.save_file(n.state_dict(), f), suffix=".safetensors"
    ),
    "a .bin": lambda: Good(seeded(Tiny(7)), suffix=".bin"),
    "a head behind dropout": lambda: Good(
        with_module(resnet(), "fc", nn.Sequential(nn.Dropout(), nn.Linear(512, 4))), architecture="resnet18"
    ),
    "a head without bias": lambda: Good(
        with_module(resnet(), "fc", nn.Linear(512, 4, bias=False)), architecture="resnet18"
    ),
    "a last layer behind dropout": lambda: Good(
        with_module(mobilenet(), "classifier.3", nn.Sequential(nn.Dropout(), nn.Linear(1024, 4))),
        architecture="mobilenet_v3_small",
    ),
    "one layer for a head of two": lambda: Good(
        with_module(mobilenet(), "classifier", nn.Sequential(nn.Dropout(), nn.Linear(576, 4))),
        architecture="mobilenet_v3_small",
    ),
    "a function's head behind dropout": lambda: Good(
        with_module(Tiny(), "head", nn.Sequential(nn.Dropout(), nn.Linear(8, 6)))
    ),
    "a head that is a convolution": lambda: Good(
        seeded(torchvision.models.squeezenet1_1(num_classes=6)), architecture="squeezenet1_1"
    ),
    "a version that safetensors lacks": lambda: Good(
        seeded(torchvision.models.mnasnet0_5(num_classes=6)),
        write=lambda n, f: safetensors.torch.save_file(n.state_dict(), f),
        suffix=".safetensors",
        architecture="mnasnet0_5",
    ),
    "an auxiliary head": lambda: Good(
        seeded(torchvision.models.googlenet(num_classes=6, init_weights=False, transform_input=True)),
        architecture="googlenet",
    ),
    "grey torchvision": lambda: Good(
        with_module(resnet(), "conv1", nn.Conv2d(1, 64, 7, 2, 3, bias=False)), architecture="resnet18", channels=1
    ),
    "grey function": lambda: Good(seeded(Tiny(6, channels=1)), channels=1),
    "timm": lambda: Good(seeded(timm_network("resnet10t", num_classes=6)), architecture="timm:resnet10t"),
    "grey timm": lambda: Good(
        seeded(timm_network("resnet10t", num_classes=6, in_chans=1)), architecture="timm:resnet10t", channels=1
    ),
    "timm with two heads": lambda: Good(
        seeded(timm_network("deit_tiny_distilled_patch16_224", num_classes=6)),
        architecture="timm:deit_tiny_distilled_patch16_224",
        size=(),
    ),
    "TorchScript": lambda: Good(seeded(Tiny(6)), write=lambda n, f: torch.jit.script(n).save(str(f))),
    "TorchScript of two outputs": lambda: Good(
        seeded(TwoOutputs(6)), write=lambda n, f: torch.jit.script(n).save(str(f))
    ),
    "TorchScript, traced, of another suffix": lambda: Good(
        seeded(Tiny(6)), write=lambda n, f: torch.jit.trace(n, torch.randn(2, 3, 32, 32)).save(str(f)), suffix=".bin"
    ),
    "TorchScript in training mode": lambda: Good(
        seeded(Tiny(6)), write=lambda n, f: torch.jit.script(n.train()).save(str(f))
    ),
    "grey TorchScript": lambda: Good(
        seeded(Tiny(6, channels=1)), write=lambda n, f: torch.jit.script(n).save(str(f)), channels=1
    ),
    "a program": lambda: Good(seeded(Tiny(6)), write=export_program, suffix=".pt2", size=()),
    "a grey program of two outputs": lambda: Good(
        seeded(TwoOutputs(6, channels=1)),
        write=lambda n, f: export_program(n, f, channels=1, side=40),
        suffix=".pt2",
        size=(),
        channels=1,
    ),
    "class names": lambda: Good(
        seeded(Tiny(3)), wrapped("state_dict", classes=["ant", "bee", "cat"]), labels=["ant", "bee", "cat"]
    ),
    "class indices": lambda: Good(
        seeded(Tiny(3)), wrapped("model", class_to_idx={"b": 1, "c": 2, "a": 0}), labels=["a", "b", "c"]
    ),
    "class names of another network": lambda: Good(seeded(Tiny(3)), wrapped("model", class_names=["one", "two"])),
}


def timm_network(name: str, **options) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, **options)


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_exported_becomes_the_network_that_was_saved(tmp_path, name):
    good = GOOD[name]()
    file = good.written(tmp_path)
    source = load_source(file, good.architecture, overrides=Overrides.read({"size": good.size}))
    is_program = isinstance(source.module, torch.fx.GraphModule)  # always in training mode, whatever was exported
    assert is_program or not source.module.training
    assert len(source.preprocessing.mean) == len(source.preprocessing.std) == good.channels
    pixels = torch.randn(2, *source.preprocessing.input_shape)
    with torch.no_grad():
        expected = good.network.eval()(pixels)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(source.module(pixels), expected)
    assert expected.abs().max() > 0
    assert source.labels == (good.labels or [f"class {index}" for index in range(expected.shape[1])])
    assert source.network == file


def test_two_outputs_of_torchscript_become_a_module_that_can_be_scripted(tmp_path):
    network = seeded(TwoOutputs(6))
    torch.jit.script(network).save(str(tmp_path / "two.pt"))
    module = torch.jit.script(load_source(str(tmp_path / "two.pt")).module)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(module(pixels), network(pixels)[0])


# Bad sources: what a file holds, or a function that writes it; options of `load_source`; a fragment of the message.
def saved(held: Callable[[], object]) -> Callable[[Path], None]:
    return lambda file: torch.save(held(), file)


def truncated(file: Path, **options: bool) -> None:
    torch.save(Tiny().state_dict(), file, **options)
    file.write_bytes(file.read_bytes()[:900])


def scripted(network: nn.Module) -> Callable[[Path], None]:
    return lambda file: torch.jit.script(network.eval()).save(str(file))


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4))


FILE = r"\S+weights\.pt"
BAD = {
    "no file": (None, {}, rf"{FILE}: no such file; give lite0, imagenet, shapes or the path"),
    "a preset misspelt": (None, {"weights": "imagnet"}, r"^imagnet: no such file; did you mean imagenet\?$"),
    "a file misspelt": (
        lambda file: file.with_name("weight.pt").touch(),
        {},
        rf"{FILE}: no such file; did you mean weight\.pt\?",
    ),
    "a folder": (Path.mkdir, {}, rf"{FILE} is a folder: give the file"),
    "an empty file": (Path.touch, {}, rf"{FILE} is empty: save or copy it again"),
    "a JPEG": (
        lambda file: file.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(99)),
        {},
        rf"{FILE} is not a weights file: give a state dict .*, a TorchScript file or a torch\.export program",
    ),
    "text": (lambda file: file.write_text("hello\nworld\n"), {}, rf"{FILE} is not a weights file"),
    "a pointer of Git LFS": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        {},
        rf"{FILE} is a pointer of Git LFS.*git lfs pull",
    ),
    "truncated": (truncated, {}, rf"{FILE} is truncated or damaged: save or copy it again"),
    "truncated, of an old format": (
        lambda file: truncated(file, _use_new_zipfile_serialization=False),
        {},
        rf"{FILE} is truncated or damaged",
    ),
    "truncated safetensors": (
        lambda file: file.with_suffix(".safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"),
        {"suffix": ".safetensors"},
        r"weights\.safetensors is not a whole safetensors file .*: save or copy it again",
    ),
    "safetensors without weights": (
        lambda file: safetensors.torch.save_file({}, file.with_suffix(".safetensors")),
        {"suffix": ".safetensors"},
        r"weights\.safetensors holds no weights: save network\.state_dict\(\)",
    ),
    "averages without weights": (saved(lambda: {"n_averaged": torch.tensor(3)}), {}, rf"{FILE} "),
    "images for steps of a sequence": (
        saved(lambda: seeded(Sequence()).state_dict()),
        {"architecture": "own_networks:sequence"},
        r"for the image alone: save it after .*, with the batch as its first dimension",
    ),
    "a pickled network": (
        saved(lambda: Tiny()),
        {},
        rf"{FILE} holds a pickled own_networks\.Tiny.*torch\.save\(network\.state_dict\(\), FILE\), and give .*--arch",
    ),
    "a pickled network under model": (
        saved(lambda: {"model": resnet()}),
        {},
        r"holds a pickled torchvision\.\S+ResNet",
    ),
    "no weights": (
        saved(lambda: {"epoch": 3, "loss": 0.5}),
        {},
        rf"{FILE} holds no weights under its keys epoch, loss",
    ),
    "a list": (saved(lambda: [1, 2]), {}, rf"{FILE} holds no weights but a list: save network\.state_dict\(\)"),
    "an --arch forgotten": (
        saved(lambda: prefixed("module.", mobilenet())),
        {},
        r"does not hold the weights of a resnet18: 102 of 102 are missing \(conv1\.weight\), \d+ unexpected "
        r"\(features\.0\.0\.weight\); its keys are those of mobilenet_v3_small: give --arch mobilenet_v3_small$",
    ),
    "a larger architecture": (
        saved(lambda: with_module(resnet(), "fc", nn.Sequential(nn.Dropout(), nn.Linear(512, 4))).state_dict()),
        {"architecture": "resnet34"},
        r"weights of a resnet34: \d+ of \d+ are missing .*give --arch resnet18$",
    ),
    "weights of nobody's": (
        saved(lambda: Tiny().state_dict()),
        {},
        r"give the --arch it was saved from: a name of torchvision, timm:NAME, or package\.module:function$",
    ),
    "a head of two layers": (
        saved(lambda: with_module(resnet(), "fc", two_layers()).state_dict()),
        {},
        r"what its own head fc computes is not in the file: give --arch package\.module:function, a function that",
    ),
    "a hidden layer of another width": (
        saved(
            lambda: with_module(
                mobilenet(), "classifier", nn.Sequential(nn.Linear(576, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 4))
            ).state_dict()
        ),
        {"architecture": "mobilenet_v3_small"},
        r"3 of another shape \(classifier\.0\.weight\); what its own head classifier computes is not in the file",
    ),
    "no such network": (
        None,
        {"architecture": "zzz"},
        r"^torchvision\.models has no 'zzz': give a name of torchvision",
    ),
    "a network misspelt": (
        None,
        {"architecture": "mobilenetv3"},
        r"^torchvision\.models has no 'mobilenetv3'; did you mean mobilenet_v3_large or mobilenet_v3_small\?$",
    ),
    "a network misspelt by a letter": (None, {"architecture": "resnet_81"}, r"did you mean resnet18"),
    "a timm network misspelt": (
        None,
        {"architecture": "timm:resnet-18"},
        r"timm has no 'resnet-18'; did you mean resnet18",
    ),
    "a timm tag that is none": (
        None,
        {"architecture": "timm:resnet18.a1_in2k"},
        r"timm has no 'resnet18\.a1_in2k'; did you mean resnet18\.a1_in1k",
    ),
    "no such module": (
        saved(lambda: Tiny().state_dict()),
        {"architecture": "nobodys_module:net"},
        r"cannot be imported \(No module named 'nobodys_module'\): set PYTHONPATH",
    ),
    "no such function": (
        saved(lambda: Tiny().state_dict()),
        {"architecture": "own_networks:tinny"},
        r"own_networks has no function 'tinny'; did you mean tiny",
    ),
    "a function that fails": (
        saved(lambda: Tiny().state_dict()),
        {"architecture": "own_networks:failing"},
        r"failed with ValueError \(no data folder\): it must return a network when it is called without arguments",
    ),
    "a function that returns no network": (
        saved(lambda: Tiny().state_dict()),
        {"architecture": "own_networks:number"},
        r"returned no torch\.nn\.Module but an object of type int",
    ),
    "four channels": (
        saved(lambda: Tiny(channels=4).state_dict()),
        {"architecture": "own_networks:four_channels"},
        r"takes images of 4 channels, but only 1 \(grey\) or 3 \(RGB\) can be served",
    ),
    "no logits": (
        saved(lambda: own_networks.features().state_dict()),
        {"architecture": "own_networks:features"},
        r"gives a tensor \[2, 8, 222, 222\] for 2 images: a classifier gives logits \[2, classes\]",
    ),
    "one class": (saved(lambda: Tiny(1).state_dict()), {"architecture": TINY}, r"needs at least 2 classes"),
    "weights that are not finite": (
        saved(lambda: Tiny().state_dict() | {"head.bias": torch.full((10,), torch.nan)}),
        {"architecture": TINY},
        r"gives values that are not finite",
    ),
    "chance": (
        saved(lambda: seeded(Noisy()).state_dict()),
        {"architecture": "own_networks:noisy"},
        r"gives other logits for an image in a batch than for the image alone: save it after \.eval\(\), without drop",
    ),
    "probabilities": (
        scripted(nn.Sequential(Tiny(), nn.Softmax(1))),
        {},
        r"gives probabilities, which sum to 1: save it without its softmax",
    ),
    "outputs swapped": (scripted(seeded(Swapped())), {}, r"the second is not the softmax of the first"),
    "TorchScript of another size": (
        scripted(Flat()),
        {"overrides": {"size": ["64"]}},
        rf"{FILE} fails on an image of 3 x 64 x 64 \(mat1 and mat2 .*\): give the --size that it takes, or one",
    ),
    "a program of another size": (
        lambda file: export_program(Tiny().eval(), file),
        {"overrides": {"size": ["64"]}},
        r"fails on an image of 3 x 64 x 64 \(Guard failed: .*\): give the --size that it takes",
    ),
    "a program for one image": (
        lambda file: export_program(Tiny().eval(), file, batch=1),
        {},
        r"takes one image of 3 x 32 x 32 but not two: export it with a dynamic first dimension",
    ),
    "a size that a network cannot take": (
        saved(lambda: timm_network("vit_tiny_patch16_224", num_classes=2).state_dict()),
        {"architecture": "timm:vit_tiny_patch16_224", "overrides": {"size": ["64"]}},
        r"fails on an image of 3 x 64 x 64 \(Input height \(64\) doesn't match model \(224\)\): .*--size",
    ),
    "three means for grey": (
        saved(lambda: Tiny(channels=1).state_dict()),
        {"architecture": TINY, "overrides": {"mean": ["0.5", "0.5", "0.5"]}},
        r"takes images of 1 channel, but --mean has 3 values: give 1",
    ),
    "one standard deviation for RGB": (
        saved(lambda: Tiny().state_dict()),
        {"architecture": TINY, "overrides": {"std": ["0.5"]}},
        r"takes images of 3 channels, but --std has 1 value: give 3",
    ),
    "a crop larger than the image": (
        saved(lambda: Tiny().state_dict()),
        {"architecture": TINY, "overrides": {"size": ["32"], "resize": ["20", "40"]}},
        r"an input of 32 x 32 cannot be cut from an image resized to 20 x 40: give a larger --resize",
    ),
    "imagenet for timm": (
        None,
        {"weights": "imagenet", "architecture": "timm:resnet18"},
        r"imagenet names weights of torchvision, but --arch is timm:resnet18: give --weights pretrained",
    ),
    "pretrained for torchvision": (
        None,
        {"weights": "pretrained", "architecture": "resnet50"},
        r"pretrained names weights of timm, but --arch is resnet50: give --arch timm:NAME, or --weights imagenet",
    ),
    "pretrained that are none": (
        None,
        {"weights": "pretrained", "architecture": "timm:coatnet_0_224"},
        r"timm has no weights of coatnet_0_224; did you mean coatnet_0_rw_224",
    ),
    "no labels file": (None, {"labels": None}, r"^--labels \S+labels\.txt cannot be read: No such file or directory$"),
    "labels that are no text": (
        None,
        {"labels": b"\xff\xfe\x00\xd8"},
        r"^--labels \S+labels\.txt is not UTF-8 text: give one class name a line$",
    ),
    "too few labels": (
        saved(lambda: Tiny().state_dict()),
        {"architecture": TINY, "labels": b"one\ntwo\n\n"},
        r"^--labels \S+labels\.txt has 2 labels for 10 classes: give one class name a line$",
    ),
}


def is_one_sentence(message: str) -> bool:
    return (
        len(message) <= MESSAGE_CHARACTERS
        and "\n" not in message
        and "weights_only" not in message
        and not re.search(r"\. [A-Z]", message)
        and " ... " not in message
    )


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path, name):
    write, options, expected = BAD[name]
    file = tmp_path / "weights.pt"
    if write:
        write(file)
    labels = None
    if "labels" in options:
        labels = tmp_path / "labels.txt"
        if options["labels"]:
            labels.write_bytes(options["labels"])
    with pytest.raises(ExportError, match=expected) as refusal:
        load_source(
            options.get("weights", str(file.with_suffix(options.get("suffix", ".pt")))),
            options.get("architecture", "resnet18"),
            labels,
            Overrides.read(options.get("overrides", {})),
        )
    assert is_one_sentence(str(refusal.value)), str(refusal.value)


@pytest.mark.parametrize(
    ("option", "words", "expected"),
    [
        ("size", ["0"], r"^--size takes a whole number from 1 to 4096, or two \(height width\), not '0'$"),
        ("size", ["-5"], r"--size takes .*, not '-5'"),
        ("size", ["224", "224", "224"], r"not '224 224 224'"),
        ("size", ["99999"], r"not '99999'"),
        ("resize", ["2.5"], r"--resize takes .*, not '2\.5'"),
        ("resize", ["large"], r"not 'large'"),
        (
            "interpolation",
            ["bicubik"],
            r"nearest, bilinear, bicubic or lanczos, not 'bicubik'; did you mean bicubic\?$",
        ),
        ("mean", ["nan"], r"--mean takes means of values in \[0, 1\], not nan"),
        ("mean", ["123.7", "116.3", "103.5"], r"not 123\.7 116\.3 103\.5: divide those of bytes by 255"),
        ("mean", ["0.5", "0.5"], r"--mean takes one number \(grey\) or three \(RGB\), not '0\.5 0\.5'"),
        ("mean", ["half"], r"not 'half'"),
        ("std", ["-0.2"], r"--std takes finite numbers above 0, not -0\.2"),
        ("std", ["0", "0", "0"], r"not 0\.0 0\.0 0\.0"),
        ("std", ["inf"], r"not inf"),
        ("std", ["nan"], r"not nan"),
    ],
)
def test_impossible_options_are_refused_in_a_sentence(option, words, expected):
    with pytest.raises(ExportError, match=expected) as refusal:
        Overrides.read({option: words})
    assert is_one_sentence(str(refusal.value))


def test_a_message_is_never_longer_than_a_sentence():
    message = str(ExportError(f"{'a' * 200}\n{'b' * 400} do that"))
    assert len(message) == MESSAGE_CHARACTERS
    assert message.startswith("aaa")
    assert message.endswith("do that")


def test_a_long_path_leaves_room_for_the_message(tmp_path):
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    torch.save(mobilenet(), folder / "weights.pt")
    with pytest.raises(ExportError, match=r"^\.\.\.\S+weights\.pt holds .* and give the network's --arch$") as refusal:
        load_source(str(folder / "weights.pt"))
    assert is_one_sentence(str(refusal.value))


@pytest.mark.parametrize("name", ["regnet_x_400mf", "vgg13_bn"])
def test_an_architecture_is_known_by_its_keys(name):
    with architectures._ShapesOnly():
        state = torchvision.models.get_model(name, num_classes=3).state_dict()
    assert architectures._matching(dict(state)) == name


def test_code_in_a_pickle_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Tiny().state_dict(), "trap": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ExportError, match=r"holds a pickled posix\.mkdir"):
        load_source(str(tmp_path / "trap.pt"), TINY)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_program_s_weights_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    export_program(Tiny().eval(), tmp_path / "good.pt2")
    torch.save((Trap(),), tmp_path / "trap.bin")
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for member in good.namelist():
            is_inputs = member.endswith("sample_inputs/model.pt")
            bad.writestr(member, (tmp_path / "trap.bin").read_bytes() if is_inputs else good.read(member))
    with pytest.raises(ExportError, match=r"torch\.export program that torch \S+ cannot load .*: export it again$"):
        load_source(str(tmp_path / "bad.pt2"))
    assert not (tmp_path / "ran").exists()


def test_a_function_s_code_is_announced(tmp_path, capsys):
    torch.save(Tiny().state_dict(), tmp_path / "weights.pt")
    load_source(str(tmp_path / "weights.pt"), TINY)
    (said,) = capsys.readouterr().out.splitlines()
    assert said == "--arch own_networks:tiny runs that function's code, which must be yours or trusted"


def test_an_assumed_head_and_a_choice_of_weights_are_announced(tmp_path, capsys):
    network = with_module(resnet(), "fc", nn.Sequential(nn.Dropout(), nn.Linear(512, 4)))
    held = {"model": network.state_dict(), "model_ema": network.state_dict()}
    torch.save(held, tmp_path / "weights.pt")
    load_source(str(tmp_path / "weights.pt"))
    chosen, assumed = capsys.readouterr().out.splitlines()
    assert chosen.endswith("weights.pt has weights under model and model_ema; those under model are taken")
    assert assumed.endswith("weights.pt has a linear head fc.1; layers without weights before it are dropout")


def state_dict_of(architecture: str, folder: Path) -> str:
    torch.save(seeded(architectures.build(architecture)).state_dict(), folder / "weights.pt")
    return str(folder / "weights.pt")


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("inception_v3", Preprocessing(342, (299, 299), "bilinear")),
        ("efficientnet_b0", Preprocessing(256, (224, 224), "bicubic")),
        ("timm:resnet10t", Preprocessing(201, (176, 176), "bicubic")),
        ("timm:vit_tiny_patch16_224", Preprocessing(248, (224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3)),
        ("timm:tiny_vit_5m_224", Preprocessing(235, (224, 224), "bicubic")),
        (TINY, Preprocessing(256, (224, 224), "bilinear")),
    ],
)
def test_a_file_has_the_preprocessing_of_its_architecture(tmp_path, architecture, expected):
    assert load_source(state_dict_of(architecture, tmp_path), architecture).preprocessing == expected


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (torchvision.models.Inception_V3_Weights, Preprocessing(342, (299, 299), "bilinear")),
        (torchvision.models.ViT_B_16_Weights, Preprocessing(256, (224, 224), "bilinear")),
        (torchvision.models.Swin_V2_T_Weights, Preprocessing(260, (256, 256), "bicubic")),
        (
            torchvision.models.EfficientNet_V2_L_Weights,
            Preprocessing(480, (480, 480), "bicubic", (0.5,) * 3, (0.5,) * 3),
        ),
    ],
)
def test_torchvision_s_weights_say_what_they_expect(weights, expected):
    assert of_torchvision(weights.DEFAULT) == expected


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, Preprocessing(248, (224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3)),
        (
            {"crop_pct": 0.95, "interpolation": "bilinear"},
            Preprocessing(235, (224, 224), "bilinear", (0.5,) * 3, (0.5,) * 3),
        ),
        ({"crop_mode": "squash"}, Preprocessing((248, 248), (224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3)),
        ({"input_size": (3, 128, 256)}, Preprocessing((142, 284), (128, 256), "bicubic", (0.5,) * 3, (0.5,) * 3)),
    ],
)
def test_a_timm_network_says_what_it_expects(changed, expected):
    network = timm_network("vit_tiny_patch16_224")
    network.pretrained_cfg = {**network.pretrained_cfg, **changed}
    assert of_timm(network) == expected


OWN = Preprocessing()
SQUASHED = Preprocessing((240, 240), (224, 224))


@pytest.mark.parametrize(
    ("own", "channels", "options", "expected"),
    [
        (OWN, 3, {}, OWN),
        (OWN, 3, {"size": "224"}, OWN),
        (OWN, 3, {"size": "384"}, Preprocessing(439, (384, 384))),
        (OWN, 3, {"size": "112 320"}, Preprocessing(366, (112, 320))),
        (OWN, 3, {"size": "300", "resize": "300"}, Preprocessing(300, (300, 300))),
        (OWN, 3, {"size": "200 100", "resize": "210 110"}, Preprocessing((210, 110), (200, 100))),
        (OWN, 3, {"resize": "224"}, Preprocessing(224)),
        (SQUASHED, 3, {"size": "112 448"}, Preprocessing((120, 480), (112, 448))),
        (OWN, 3, {"interpolation": "lanczos"}, Preprocessing(interpolation="lanczos")),
        (OWN, 3, {"mean": "0,0,0", "std": "1, 1, 1"}, Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))),
        (OWN, 1, {}, Preprocessing(mean=(0.449,), std=(0.226,))),
        (OWN, 1, {"mean": "0.1"}, Preprocessing(mean=(0.1,), std=(0.226,))),
    ],
)
def test_options_change_the_preprocessing(own, channels, options, expected):
    overrides = Overrides.read({name: [words] for name, words in options.items()})
    assert overrides.applied_to(own, channels, "a file") == expected


def test_a_program_says_which_images_it_takes(tmp_path):
    export_program(seeded(Tiny(6)), tmp_path / "weights.pt2", side=96)
    assert load_source(str(tmp_path / "weights.pt2")).preprocessing == Preprocessing(110, (96, 96))


def test_weights_that_torchvision_published_have_their_own_labels_and_preprocessing(tmp_path, monkeypatch):
    # This network has two; a file of the first must not get the preprocessing of the second, which is the default.
    known = torchvision.models.MobileNet_V2_Weights
    assert known.DEFAULT.transforms().resize_size[0] == 232
    monkeypatch.setattr("tools.classifiers.loading.sha256_of", lambda path: "b0353104" + 56 * "0")
    source = load_source(state_dict_of("mobilenet_v2", tmp_path), "mobilenet_v2")
    assert source.preprocessing.resize == known.IMAGENET1K_V1.transforms().resize_size[0] == 256
    assert source.labels == known.IMAGENET1K_V1.meta["categories"]


def test_labels_replace_those_of_the_weights(tmp_path):
    torch.save({"model": Tiny(2).state_dict(), "classes": ["a", "b"]}, tmp_path / "weights.pt")
    (tmp_path / "labels.txt").write_text("Käse\nBrot\n", encoding="utf-8-sig")
    assert load_source(str(tmp_path / "weights.pt"), TINY, tmp_path / "labels.txt").labels == ["Käse", "Brot"]


def test_timm_s_weights_that_cannot_be_fetched_are_named(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*arguments, **options):
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(
        DownloadError, match=r"timm's weights of resnet18 could not be fetched \(.*\): fetch"
    ) as refusal:
        load_source("pretrained", "timm:resnet18")
    assert is_one_sentence(str(refusal.value))


def test_timm_s_weights_come_with_labels_and_preprocessing(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    asked = []

    def without_download(name, pretrained):
        asked.append((name, pretrained))
        return seeded(create(name))

    monkeypatch.setattr("tools.classifiers.loading._ask_for", lambda config: None)
    monkeypatch.setattr(timm, "create_model", without_download)
    source = load_source("pretrained", "timm:resnet10t.c3_in1k")
    assert asked == [("resnet10t.c3_in1k", True)]
    assert (len(source.labels), source.labels[0]) == (1000, "tench, Tinca tinca")
    assert source.preprocessing == Preprocessing(201, (176, 176), "bicubic")
    assert (source.network, source.weights) == ("pretrained", "timm resnet10t.c3_in1k")


def test_the_command_ends_with_the_sentence(tmp_path, monkeypatch):
    torch.save(Tiny(), tmp_path / "pickled.pt")
    repository = tmp_path / "repository"
    words = ["--weights", str(tmp_path / "pickled.pt"), "--size", "224", "--repository", str(repository)]
    monkeypatch.setattr(sys, "argv", ["export", *words])
    with pytest.raises(SystemExit, match=r"^export: \S+pickled\.pt holds a pickled .* and give the network's --arch$"):
        export.main()
    assert not repository.exists()


def test_the_command_s_options_reach_the_manifest(tmp_path, monkeypatch, capsys):
    torch.save(seeded(Tiny(2)).state_dict(), tmp_path / "weights.pt")
    words = ["--weights", str(tmp_path / "weights.pt"), "--arch", TINY, "--repository", str(tmp_path)]
    words += ["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25", "--resize", "230", "240"]
    monkeypatch.setattr(sys, "argv", ["export", *words, "--interpolation", "bicubic"])
    export.main()
    assert export.read_manifest(tmp_path)["preprocessing"] == {
        "resize": [230, 240],
        "crop": [224, 224],
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    assert f"wrote {tmp_path / 'classifier' / '1' / 'model.pt'}" in capsys.readouterr().out
