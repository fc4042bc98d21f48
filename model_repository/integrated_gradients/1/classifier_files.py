"""The classifier's file and the normalisation of its pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preprocessing:
    """What `preprocess` does to an image: resize, central crop, (value - mean) / std. The defaults are torchvision's.

    Attributes:
        resize: pixels of the shorter side, or (height, width) exactly.
        crop: (height, width) of the classifier's input.
        interpolation: of the resizing: nearest, bilinear, bicubic or lanczos.
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

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[channels, height, width] of the classifier's input."""
        return len(self.mean), *self.crop


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

    def normalisation(self, settings: Mapping[str, str]) -> tuple[list[float], list[float]]:
        """Mean and standard deviation, one value for each channel.

        They come from the manifest that `tools/export` writes. For any other TorchScript file they come from
        ``settings``, where ``mean`` and ``std`` are comma-separated numbers.
        """
        manifest = self.folder / "manifest.json"
        written = json.loads(manifest.read_text()) if manifest.is_file() else {}
        is_of_model = self.sha256 and written.get("model_sha256") == self.sha256
        own = written["preprocessing"] if is_of_model else {}
        mean, std = (own.get(name) or [float(value) for value in settings[name].split(",")] for name in ("mean", "std"))
        return mean, std
