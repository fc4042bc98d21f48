"""A classifier with what is known about it, before it is exported."""

from __future__ import annotations

from dataclasses import dataclass, field

from classifier_files import Preprocessing
from torch import nn


class ExportError(Exception):
    """The model cannot be exported; the message says why and what to do."""


class DownloadError(ExportError):
    """Weights could not be fetched."""


@dataclass(frozen=True)
class Source:
    """An eager model in evaluation mode, its class names, and the source of its weights.

    ``network`` is the argument ``weights`` of ``load_source``; ``weights`` describes their source.
    """

    module: nn.Module
    labels: list[str]
    architecture: str
    weights: str
    sha256: str | None = None
    network: str = ""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
