"""A classifier with what is known about it, before it is exported."""

from __future__ import annotations

from dataclasses import dataclass, field

from classifier_files import Preprocessing
from error_reasons import in_brief
from torch import nn

# Longest message, so that it stays a sentence on a terminal.
MESSAGE_CHARACTERS = 300


class ExportError(Exception):
    """The model cannot be exported; the message says in one sentence why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(in_brief(message, MESSAGE_CHARACTERS))


class DownloadError(ExportError):
    """Weights could not be fetched."""


@dataclass(frozen=True)
class Source:
    """A network in evaluation mode that gives logits, its class names, and the source of its weights.

    ``module`` is eager, a ``torch.jit.ScriptModule``, or the module of a ``torch.export`` program. ``network`` is the
    argument ``weights`` of ``load_source``; ``weights`` describes their source.
    """

    module: nn.Module
    labels: list[str]
    architecture: str
    weights: str
    sha256: str | None = None
    network: str = ""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
