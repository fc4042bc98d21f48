"""The server's answers as frozen dataclasses with NumPy arrays."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image


@dataclass(frozen=True)
class Prediction:
    """One class of an answer."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Explanation(Attribution):
    """A prediction and the attribution that explains it.

    Attributes:
        predictions: the likeliest classes, best first.
        explained_class: the class whose evidence is shown.
    """

    predictions: tuple[Prediction, ...]
    explained_class: int

    @property
    def explained_label(self) -> str:
        """The explained class's label if it is among the predictions, else its number."""
        return label_of(self.explained_class, self.predictions)


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
    """

    predictions: tuple[Prediction, ...]
    explained_class: int
    milliseconds: float

    @property
    def explained_label(self) -> str:
        """The explained class's label if it is among the predictions, else its number."""
        return label_of(self.explained_class, self.predictions)


@dataclass(frozen=True)
class Level(Attribution):
    """A later response of a stream: the attribution so far.

    Attributes:
        is_last: whether it is the final one.
    """

    is_last: bool


def label_of(index: int, predictions: tuple[Prediction, ...]) -> str:
    """The label of a class if it is among the predictions, else its number."""
    return next((prediction.label for prediction in predictions if prediction.index == index), str(index))
