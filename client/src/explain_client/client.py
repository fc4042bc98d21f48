"""A small typed client over ``tritonclient.grpc`` for the ensembles ``classify`` and ``explain``."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

ImageSource = str | Path | bytes
ParameterValue = str | int | float


class ExplainError(Exception):
    """The server refused the request or cannot be reached; the message is the server's own."""


@dataclass(frozen=True)
class Prediction:
    """One class of an answer."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Explanation:
    """What the server answered about one image.

    Attributes:
        predictions: the likeliest classes, best first.
        explained_class: the class whose evidence is shown.
        saliency: float32 [224, 224], the attribution summed over channels; positive speaks for the class.
        heatmap_png: the attribution drawn over the image as the model saw it, a PNG file.
        convergence_delta: sum of the attributions minus the change of the output along the path.
        n_steps: gradient evaluations spent.
        error_estimate: estimated relative error of the attribution; NaN where the method gives none.
        milliseconds: from sending the request to having the answer.
    """

    predictions: tuple[Prediction, ...]
    explained_class: int
    saliency: npt.NDArray[np.float32]
    heatmap_png: bytes
    convergence_delta: float
    n_steps: int
    error_estimate: float
    milliseconds: float

    @property
    def heatmap(self) -> Image.Image:
        """The heatmap as an RGB image."""
        return Image.open(io.BytesIO(self.heatmap_png)).convert("RGB")


class ExplainClient:
    """A connection to a server, usable as a context manager.

    Args:
        url: host and gRPC port.
        timeout: seconds that a request may take.
    """

    def __init__(self, url: str = "localhost:8001", timeout: float = 300.0) -> None:
        self._triton = triton.InferenceServerClient(url)
        self._timeout = timeout

    def __enter__(self) -> ExplainClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._triton.close()

    def classify(self, image: ImageSource, *, top_k: int = 5) -> tuple[Prediction, ...]:
        """The likeliest classes of one image, best first.

        Raises:
            ExplainError: the server refused the request or cannot be reached.
            OSError: the image's file cannot be read.
        """
        outputs = [triton.InferRequestedOutput("PROBABILITIES", class_count=top_k)]
        return _predictions(self._infer("classify", [_image_input(image)], outputs, {}))

    def explain(
        self, image: ImageSource, *, target: int | None = None, top_k: int = 5, **parameters: ParameterValue
    ) -> Explanation:
        """The prediction for one image and the attribution that explains it.

        Args:
            image: the path or the bytes of a JPEG, PNG or WebP file.
            target: the class to explain; the predicted one if absent.
            top_k: how many predictions to return.
            parameters: request parameters of the serving contract: ``n_steps``, ``method``, ``baseline``, ...

        Raises:
            ExplainError: the server refused the request or cannot be reached.
            OSError: the image's file cannot be read.
        """
        inputs = [_image_input(image)]
        if target is not None:
            inputs.append(triton.InferInput("TARGET", [1, 1], "INT64"))
            inputs[-1].set_data_from_numpy(np.array([[target]], np.int64))
        names = ("EXPLAINED_CLASS", "SALIENCY", "HEATMAP", "CONVERGENCE_DELTA", "N_STEPS", "ERROR_ESTIMATE")
        outputs = [triton.InferRequestedOutput("PROBABILITIES", class_count=top_k)]
        outputs += [triton.InferRequestedOutput(name) for name in names]
        started = time.perf_counter()
        result = self._infer("explain", inputs, outputs, parameters)
        milliseconds = 1e3 * (time.perf_counter() - started)
        explained, saliency, heatmap, delta, steps, error = (result.as_numpy(name)[0] for name in names)
        return Explanation(
            predictions=_predictions(result),
            explained_class=int(explained[0]),
            saliency=saliency,
            heatmap_png=bytes(heatmap[0]),
            convergence_delta=float(delta[0]),
            n_steps=int(steps[0]),
            error_estimate=float(error[0]),
            milliseconds=milliseconds,
        )

    def _infer(
        self,
        model: str,
        inputs: list[triton.InferInput],
        outputs: list[triton.InferRequestedOutput],
        parameters: dict[str, ParameterValue],
    ) -> triton.InferResult:
        # Triton's Python backend of that release passes strings and integers on, but drops doubles.
        sent = {name: str(value) if isinstance(value, float) else value for name, value in parameters.items()}
        try:
            return self._triton.infer(
                model,
                inputs,
                outputs=outputs,
                parameters=sent,
                client_timeout=self._timeout,
                timeout=int(1e6 * self._timeout),  # the server stops working for an answer that nobody waits for
            )
        except InferenceServerException as error:
            raise ExplainError(error.message()) from error


def _image_input(image: ImageSource) -> triton.InferInput:
    encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
    tensor = triton.InferInput("IMAGE", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[encoded]], np.object_))
    return tensor


def _predictions(result: triton.InferResult) -> tuple[Prediction, ...]:
    """Parse Triton's classification extension: ``probability:index:label`` for each class."""
    predictions = []
    for entry in result.as_numpy("PROBABILITIES")[0]:
        probability, index, label = entry.decode().split(":", 2)
        predictions.append(Prediction(int(index), label, float(probability)))
    return tuple(predictions)
