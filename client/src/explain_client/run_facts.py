"""What all images of a run have in common, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from explain_client import captions
from explain_client.aio import AsyncExplainClient
from explain_client.errors import ExplainError
from explain_client.parameters import Polarity
from explain_client.protocol import PREDICTED_CLASS
from explain_client.results import Network
from explain_client.runs import top_of

# What the drawing of a page does not take from the parameters of the server's own heatmap files.
_OF_HEATMAP_FILES = ("overlay", "polarity", "clip_percentile", "colormap")


@dataclass(frozen=True)
class Run:
    """What all images of a run have in common.

    Attributes:
        network: that was explained; None if the server does not say.
        explained: words for the classes to explain instead of the predicted one.
        contrast, contrast_label: class to subtract.
        parameters: request parameters, as sent.
    """

    network: Network | None = None
    explained: str | None = None
    contrast: int | None = None
    contrast_label: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        network: Network | None,
        labels: Sequence[str],
        target: int | None,
        parameters: Mapping[str, Any],
        targets: str | Sequence[int] | None = None,
    ) -> Run:
        """Describe a run by its requests.

        Args:
            network: that was explained.
            labels: of all classes.
            target: class to explain; None or -1: the predicted one.
            parameters: request parameters; ``contrast`` is a number.
            targets: several classes to explain; ``topN`` for the likeliest.
        """
        contrast = parameters.get("contrast")
        if isinstance(targets, str):
            words = f"the {top_of(targets)} likeliest classes" if top_of(targets) > 1 else "the likeliest class"
        elif targets is not None:
            words = ", ".join(labels[each] for each in targets)
        else:
            words = "" if target is None or target == PREDICTED_CLASS else labels[target]
        return cls(
            network,
            words or None,
            contrast,
            None if contrast is None else labels[contrast],
            parameters,
        )

    @property
    def polarity(self) -> Polarity:
        """Of the colours: the one that was asked for, else the signed view."""
        named = self.parameters.get("polarity", "all")
        return next((polarity for polarity in captions.POLARITIES if polarity == named), "all")

    @property
    def heatmap_polarity(self) -> Polarity:
        """Of the server's heatmap files, whose default is another than that of the colours."""
        return self.polarity if "polarity" in self.parameters else "positive"

    @property
    def shows_regions(self) -> bool:
        """Whether the server's heatmap files show regions."""
        return self.parameters.get("overlay") == "regions"

    def facts(self, started: datetime) -> dict[str, str]:
        """What -> its words, for people."""
        network = "the server does not name it"
        if self.network is not None:
            network = " · ".join(filter(None, (self.network.architecture, self.network.weights))) or "unnamed"
        explained = self.explained or "the class that the network predicted"
        if self.contrast_label:
            explained = f"{explained} rather than {self.contrast_label}"
        sent = {name: value for name, value in self.parameters.items() if name not in (*_OF_HEATMAP_FILES, "contrast")}
        facts = {
            "Network": network,
            "Checksum": self.network.sha256 if self.network else "",
            "Date": f"{started:%d %B %Y, %H:%M}",
            "Explained": explained,
            "Colours": captions.POLARITIES[self.polarity],
            "Parameters": ", ".join(f"{name} = {value}" for name, value in sent.items()) or "the server's defaults",
        }
        return {what: words for what, words in facts.items() if words}


async def describe_run(
    client: AsyncExplainClient,
    target: int | None = None,
    targets: str | Sequence[int] | None = None,
    **parameters: Any,
) -> Run:
    """Ask the server what a run's report says of it; what the server does not tell stays open. Arguments of ``of``."""
    try:
        network = await client.network()
    except ExplainError:  # a server of another version of the model repository
        network = None
    asks_by_number = target is not None or targets is not None or "contrast" in parameters
    labels = await client.labels() if asks_by_number else ()
    return Run.of(network, labels, target, parameters, targets)
