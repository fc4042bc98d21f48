"""The classifier's file, and how images become its input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from load_errors import LoadError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class PreprocessingError(LoadError):
    """The classifier's manifest, the model's config and its settings do not fit; the message says what to do."""


@dataclass(frozen=True)
class Preprocessing:
    """What `preprocess` does to an image: resize, central crop, (value - mean) / std. The defaults are torchvision's.

    Attributes:
        resize: pixels of the shorter side, or (height, width) exactly.
        crop: (height, width) of the classifier's input.
        interpolation: of the resizing, one of ``INTERPOLATIONS``.
        mean, std: one value for each channel, of values in [0, 1]. One channel is grey, three are RGB.
    """

    resize: int | tuple[int, int] = 256
    crop: tuple[int, int] = (224, 224)
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @classmethod
    def from_manifest(cls, written: Mapping[str, Any]) -> Preprocessing:
        """Read what `tools/export` wrote; defaults stand for what an older version left out."""
        values: dict[str, Any] = {}
        for name in (field.name for field in fields(cls) if field.name in written):
            values[name] = tuple(written[name]) if isinstance(written[name], list) else written[name]
        return cls(**values)

    @classmethod
    def from_settings(cls, settings: Mapping[str, str], input_shape: Sequence[int]) -> Preprocessing:
        """Read a model's settings: comma-separated numbers.

        Args:
            settings: ``mean``, ``std`` and optionally ``resize`` (one number or two) and ``interpolation``.
            input_shape: [channels, height, width] of the classifier's input.

        Raises:
            PreprocessingError: a setting is no such number, or ``resize`` is less than the input.
        """
        channels, *crop = input_shape
        mean, std = (_numbers(settings, name, float, (channels,)) for name in ("mean", "std"))
        sides = _numbers({"resize": str(cls.resize), **settings}, "resize", int, (1, 2))
        resize = sides[0] if len(sides) == 1 else (sides[0], sides[1])
        if sides[0] < crop[0] or sides[-1] < crop[1]:
            raise PreprocessingError(
                f"the setting resize must be at least the input of {_shown(crop)}, not {_shown(sides)}"
            )
        return cls(resize, (crop[0], crop[1]), settings.get("interpolation", cls.interpolation), mean, std)

    @property
    def channels(self) -> int:
        """Of the classifier's input: 1 is grey, 3 are RGB."""
        return len(self.mean)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[channels, height, width] of the classifier's input."""
        return self.channels, *self.crop


def pixels_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """[channels, height, width] of the tensor ``PIXELS`` in a model's config."""
    tensors = (*config["input"], *config["output"])
    return tuple(int(size) for size in next(tensor["dims"] for tensor in tensors if tensor["name"] == "PIXELS"))


@dataclass(frozen=True)
class ClassifierFiles:
    """The folder of a version of the classifier."""

    folder: Path

    @classmethod
    def beside(cls, model_repository: str, version: str) -> ClassifierFiles:
        """The classifier in the repository of another model, from Triton's arguments to that model."""
        return cls(Path(model_repository).parent / "classifier" / version)

    @property
    def model(self) -> Path:
        """The TorchScript file."""
        return self.folder / "model.pt"

    @cached_property
    def sha256(self) -> str:
        """Checksum of the TorchScript file; empty if there is none."""
        return hashlib.sha256(self.model.read_bytes()).hexdigest() if self.model.is_file() else ""

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What `tools/export` wrote about the TorchScript file; empty if the file is another one."""
        file = self.folder / "manifest.json"
        manifest = json.loads(file.read_text()) if file.is_file() else {}
        return manifest if self.sha256 and manifest.get("model_sha256") == self.sha256 else {}

    @property
    def network(self) -> dict[str, str]:
        """Names of the network and its weights, empty if they are not known, and the checksum."""
        names = {name: str(self.manifest.get(name, "")) for name in ("architecture", "weights")}
        return {**names, "sha256": self.sha256}

    def preprocessing(self, settings: Mapping[str, str], input_shape: Sequence[int]) -> Preprocessing:
        """How images become the classifier's input.

        It comes from the manifest that `tools/export` writes. For any other TorchScript file it comes from the
        settings and the input's shape in the config of the model that asks.

        Args:
            settings: of the model that asks, see ``Preprocessing.from_settings``.
            input_shape: [channels, height, width] of ``PIXELS`` in its config.

        Raises:
            PreprocessingError: the manifest is for another shape, or a setting or the manifest cannot be served.
        """
        if self.manifest:
            preprocessing = Preprocessing.from_manifest(self.manifest["preprocessing"])
            if preprocessing.input_shape != tuple(input_shape):
                raise PreprocessingError(
                    f"{self.folder / 'manifest.json'} is for an input of {_shown(preprocessing.input_shape)}, but "
                    f"PIXELS in this model's config.pbtxt are {_shown(input_shape)}; python -m tools.export writes both"
                )
        else:
            preprocessing = Preprocessing.from_settings(settings, input_shape)
        if preprocessing.channels not in (1, 3):
            raise PreprocessingError(f"the input must have 1 channel (grey) or 3 (RGB), not {preprocessing.channels}")
        if preprocessing.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise PreprocessingError(f"interpolation must be one of {known}, not {preprocessing.interpolation!r}")
        return preprocessing


def _numbers(settings: Mapping[str, str], name: str, kind: type, counts: Sequence[int]) -> tuple[Any, ...]:
    """Comma-separated numbers of a setting, as many as one of ``counts``.

    Raises:
        PreprocessingError: they are no numbers, or not as many.
    """
    try:
        numbers = tuple(kind(number) for number in settings[name].split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts:
        wanted = " or ".join(map(str, counts))
        what = {int: "integers", float: "numbers"}[kind]
        raise PreprocessingError(f"the setting {name} must be {wanted} comma-separated {what}, not {settings[name]!r}")
    return numbers


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
