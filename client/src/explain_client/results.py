"""The server's answers as frozen dataclasses with NumPy arrays."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image


@dataclass(frozen=True)
class Prediction:
    """One class of an answer."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True, repr=False)
class Attribution:
    """How much each pixel supports a class, with error estimates.

    Attributes:
        convergence_delta: sum of the attributions minus the change of the output along the path.
        n_steps: gradient evaluations taken.
        error_estimate: estimated relative error of the attribution; NaN where the method gives none.
        milliseconds: from sending the request to this response.
        saliency: float32 [height, width], the attribution summed over channels; positive values support the class.
            None if not requested.
        attributions: float32 [channels, height, width], per channel. None if not requested.
        heatmap_png: the saliency drawn over the image as the model saw it, a PNG file. None if not requested.
    """

    convergence_delta: float
    n_steps: int
    error_estimate: float
    milliseconds: float
    saliency: npt.NDArray[np.float32] | None
    attributions: npt.NDArray[np.float32] | None
    heatmap_png: bytes | None

    @property
    def heatmap(self) -> Image.Image:
        """The heatmap as an RGB image.

        Raises:
            ValueError: it was not requested.
        """
        if self.heatmap_png is None:
            raise ValueError("the heatmap was not requested; name it in `want`")
        return Image.open(io.BytesIO(self.heatmap_png)).convert("RGB")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._facts())})"

    def _repr_html_(self) -> str:
        """For notebooks: the heatmap, what was predicted, and how accurate the explanation is."""
        picture = ""
        if self.heatmap_png is not None:
            data = base64.b64encode(self.heatmap_png).decode("ascii")
            picture = f'<img alt="the heatmap" src="data:image/png;base64,{data}">'
        lines = "".join(f"<div>{line}</div>" for line in (*self._headings(), self._accuracy()))
        return f"<figure>{picture}<figcaption>{lines}</figcaption></figure>"

    def _facts(self) -> list[str]:
        error = [] if math.isnan(self.error_estimate) else [f"error {self.error_estimate:.1%}"]
        return [f"{self.n_steps} steps", *error]

    def _headings(self) -> list[str]:
        """Lines of HTML above the accuracy."""
        return []

    def _accuracy(self) -> str:
        if math.isnan(self.error_estimate):
            return f"{self.n_steps} steps, no estimate of the explanation's error"
        error = self.error_estimate
        return f"explanation accurate to about ±{100 * error:.{0 if error >= 0.01 else 1}f} %, {self.n_steps} steps"


@dataclass(frozen=True, repr=False)
class Explanation(Attribution):
    """A prediction and the attribution that explains it.

    Attributes:
        predictions: the likeliest classes, best first.
        explained_class: the class whose evidence is shown.
        explained_label: its label; its number if it is not given and not among the predictions.
    """

    predictions: tuple[Prediction, ...]
    explained_class: int
    explained_label: str = ""

    def __post_init__(self) -> None:
        if not self.explained_label:
            object.__setattr__(self, "explained_label", label_of(self.explained_class, self.predictions))

    def _facts(self) -> list[str]:
        best = self.predictions[0]
        return [self.explained_label, f"predicted {best.label} {best.probability:.1%}", *super()._facts()]

    def _headings(self) -> list[str]:
        predicted = ", ".join(f"{escape(each.label)} {each.probability:.1%}" for each in self.predictions)
        return [f"evidence for <b>{escape(self.explained_label)}</b>", f"predicted: {predicted}"]


@dataclass(frozen=True)
class Network:
    """The network that a server explains.

    Attributes:
        architecture, weights: as they were exported; empty if the file was not exported with this project's tools.
        sha256: checksum of its TorchScript file.
    """

    architecture: str
    weights: str
    sha256: str


@dataclass(frozen=True)
class Classification:
    """The first response of a stream.

    Attributes:
        predictions: the likeliest classes, best first.
        explained_class: the class whose evidence will be shown.
        milliseconds: from sending the request to this response.
        explained_label: its label; its number if it is not given and not among the predictions.
    """

    predictions: tuple[Prediction, ...]
    explained_class: int
    milliseconds: float
    explained_label: str = ""

    def __post_init__(self) -> None:
        if not self.explained_label:
            object.__setattr__(self, "explained_label", label_of(self.explained_class, self.predictions))


@dataclass(frozen=True, repr=False)
class Level(Attribution):
    """A later response of a stream: the attribution so far.

    Attributes:
        is_last: whether it is the final one.
    """

    is_last: bool


def label_of(index: int, predictions: tuple[Prediction, ...]) -> str:
    """The label of a class if it is among the predictions, else its number."""
    return next((prediction.label for prediction in predictions if prediction.index == index), str(index))


Answer = TypeVar("Answer", Explanation, Classification)


def has_label(answer: Explanation | Classification) -> bool:
    """Whether the label of the explained class came with the predictions."""
    return any(prediction.index == answer.explained_class for prediction in answer.predictions)


def with_label(answer: Answer, labels: Sequence[str], is_predicted: bool) -> Answer:
    """The same answer with the label of its explained class, which its predictions lack.

    Args:
        labels: of all classes.
        is_predicted: the explained class is the predicted one: its probability ties with the first prediction's.
    """
    index = answer.explained_class
    predictions: tuple[Prediction, ...] = answer.predictions
    if is_predicted:
        predictions = (Prediction(index, labels[index], predictions[0].probability), *predictions[:-1])
    return replace(answer, explained_label=labels[index], predictions=predictions)
