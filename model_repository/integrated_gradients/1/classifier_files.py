"""The classifier's file and the normalisation of its pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


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
