"""What all images of a run have in common, for its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from explain_client import captions
from explain_client.aio import AsyncExplainClient
from explain_client.errors import ExplainError
from explain_client.results import Explanation, Network

# What the drawing of a page does not take from the parameters of the server's own heatmap files.
_OF_HEATMAP_FILES = ("overlay", "polarity", "clip_percentile", "colormap")


@dataclass(frozen=True)
class Run:
    """What all images of a run have in common.

    Attributes:
        network: that was explained; None if the server does not say.
        target, contrast: class to explain instead of the predicted one, and class to subtract; with their labels, if
            they are known.
        parameters: request parameters, as sent.
    """

    network: Network | None = None
    target: int | None = None
    target_label: str | None = None
    contrast: int | None = None
    contrast_label: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def polarity(self) -> captions.Polarity:
        """Of the colours: the one that was asked for, else the signed view."""
        named = self.parameters.get("polarity", "all")
        return next((polarity for polarity in captions.POLARITIES if polarity == named), "all")

    def facts(self, started: datetime) -> dict[str, str]:
        """What -> its words, for people."""
        network = "the server does not name it"
        if self.network is not None:
            network = " · ".join(filter(None, (self.network.architecture, self.network.weights))) or "unnamed"
        explained = "the class that the network predicted"
        if self.target is not None:
            explained = self.target_label or f"class {self.target}"
        contrast = f"{explained} rather than {self._contrast}" if self._contrast else ""
        sent = {name: value for name, value in self.parameters.items() if name not in (*_OF_HEATMAP_FILES, "contrast")}
        facts = {
            "Network": network,
            "Checksum": self.network.sha256 if self.network else "",
            "Date": f"{started:%d %B %Y, %H:%M}",
            "Explained": contrast or explained,
            "Colours": captions.POLARITIES[self.polarity],
            "Parameters": ", ".join(f"{name} = {value}" for name, value in sent.items()) or "the server's defaults",
        }
        return {what: words for what, words in facts.items() if words}

    @property
    def _contrast(self) -> str | None:
        return None if self.contrast is None else self.contrast_label or f"class {self.contrast}"

    def contrast_in(self, explanation: Explanation) -> str | None:
        """The label of the class that was subtracted."""
        if self.contrast is None:
            return None
        return self.contrast_label or captions.name_of(self.contrast, explanation.predictions)

    def explained_in(self, explanation: Explanation) -> str:
        """The label of the class that was explained."""
        if explanation.explained_class == self.target and self.target_label:
            return self.target_label
        return captions.name_of(explanation.explained_class, explanation.predictions)


async def describe_run(client: AsyncExplainClient, target: int | None, parameters: Mapping[str, Any]) -> Run:
    """Ask the server what a run's report says of it; what the server does not tell stays open.

    Args:
        client: of the run.
        target: class to explain; None or -1: the predicted one.
        parameters: request parameters; ``contrast`` is a number.
    """
    try:
        network = await client.network()
    except ExplainError:  # a server of another version of the model repository
        network = None
    target, contrast = None if target == -1 else target, parameters.get("contrast")
    labels = await client.labels() if target is not None or contrast is not None else ()
    return Run(
        network,
        target,
        None if target is None else labels[target],
        contrast,
        None if contrast is None else labels[contrast],
        parameters,
    )
