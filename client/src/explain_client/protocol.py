"""The serving contract: builds tritonclient's requests and reads its results into dataclasses, for both clients."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.grpc._utils import _get_inference_request  # makes the message that tritonclient's calls send

from explain_client.errors import ExplainError
from explain_client.images import DEFAULT_VIEW, ImageSource, View, encoded
from explain_client.parameters import as_sent
from explain_client.results import Classification, Explanation, Level, Network, Prediction

Model: TypeAlias = Literal["explain", "explain_stream"]
Wanted: TypeAlias = Literal["saliency", "attributions", "heatmap"]

# At 224 x 224 pixels a saliency map is 200 KB, attributions are 600 KB, a heatmap is some tens of KB.
TENSORS: Mapping[Wanted, str] = {"saliency": "SALIENCY", "attributions": "ATTRIBUTIONS", "heatmap": "HEATMAP"}
# The target that stands for the predicted class.
PREDICTED_CLASS = -1
ALL_CLASSES = 2**31 - 1  # Triton gives as many as there are
# Where the image is of no account.
_BLANK = np.zeros((8, 8, 3), np.uint8)
_SCALARS = ("CONVERGENCE_DELTA", "N_STEPS", "ERROR_ESTIMATE")


@dataclass(frozen=True)
class Call:
    """A request, without its transport; ``explains_prediction``: it names no other class to explain."""

    model: str
    inputs: list[triton.InferInput]
    outputs: list[triton.InferRequestedOutput]
    parameters: dict[str, str | int]
    explains_prediction: bool = True

    def options(self, seconds: float) -> dict[str, Any]:
        """Keyword arguments of tritonclient's inference calls, for an answer within ``seconds``."""
        return {
            "model_name": self.model,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "parameters": self.parameters,
            # In microseconds: the server stops working on the request then.
            "timeout": max(1, int(1e6 * seconds)),
        }


def message_of(call: Call, seconds: float) -> service_pb2.ModelInferRequest:
    """The message of a request, for an answer within ``seconds``."""
    unused = {"sequence_id": 0, "sequence_start": False, "sequence_end": False, "priority": 0}
    return _get_inference_request(model_version="", request_id="", **unused, **call.options(seconds))


def classify_call(image: ImageSource, top_k: int) -> Call:
    """A request to ``classify``."""
    return Call("classify", [_image(image)], [_classes(top_k)], {})


def explain_call(
    model: Model,
    image: ImageSource,
    targets: Sequence[int],
    top_k: int,
    want: Collection[Wanted],
    parameters: Mapping[str, Any],
) -> Call:
    """A request to ``explain`` or ``explain_stream`` for one class of an image, or for several.

    Raises:
        ValueError: there are no targets, or ``want`` has an unknown name.
        TypeError: ``parameters`` has one.
    """
    unknown = set(want) - set(TENSORS)
    if unknown:
        raise ValueError(f"`want` takes {', '.join(TENSORS)}, not {', '.join(sorted(unknown))}")
    if not targets:
        raise ValueError("`targets` takes at least one class")
    # Always with a target: by it the server knows early that gradients are wanted.
    inputs = [_image(image, len(targets)), triton.InferInput("TARGET", [len(targets), 1], "INT64")]
    inputs[1].set_data_from_numpy(np.array(targets, np.int64)[:, None])
    names = ["EXPLAINED_CLASS", *_SCALARS, *(TENSORS[name] for name in want)]
    outputs = [_classes(top_k), *(triton.InferRequestedOutput(name) for name in names)]
    return Call(model, inputs, outputs, as_sent(parameters), set(targets) == {PREDICTED_CLASS})


def classes_asked(target: int | str | None, targets: Sequence[int | str] | None) -> list[int | str]:
    """The classes that a request asks for: one, the predicted one if ``target`` is absent, or all of ``targets``.

    Raises:
        ValueError: both are given.
    """
    if targets is None:
        return [PREDICTED_CLASS if target is None else target]
    if target is not None:
        raise ValueError("`target` must be absent beside `targets`")
    return list(targets)


def labels_call() -> Call:
    """A request for the probabilities of all classes, with their labels."""
    return classify_call(_BLANK, ALL_CLASSES)


def read_predictions(result: triton.InferResult, row: int = 0) -> tuple[Prediction, ...]:
    """Read Triton's classification extension, ``probability:index:label`` for each class."""
    predictions = []
    for entry in result.as_numpy("PROBABILITIES")[row]:
        probability, index, *label = entry.decode().split(":", 2)
        predictions.append(Prediction(int(index), label[0] if label else index, float(probability)))
    return tuple(predictions)


def read_labels(result: triton.InferResult) -> tuple[str, ...]:
    """The label of each class, from the answer to ``labels_call``."""
    return tuple(prediction.label for prediction in sorted(read_predictions(result), key=lambda each: each.index))


def read_explanations(call: Call, result: triton.InferResult, milliseconds: float) -> tuple[Explanation, ...]:
    """The answers of ``explain``, one for each class that was asked for."""
    explanations = []
    for row in range(len(result.as_numpy("EXPLAINED_CLASS"))):
        predictions, explained = _classification(call, result, row)
        attribution = _attribution(result, milliseconds, row)
        explanations.append(Explanation(**attribution, predictions=predictions, explained_class=explained))
    return tuple(explanations)


def read_response(call: Call, result: triton.InferResult, milliseconds: float) -> Classification | Level:
    """One response of ``explain_stream``."""
    if result.as_numpy("PROBABILITIES") is not None:
        return Classification(*_classification(call, result), milliseconds)
    return Level(**_attribution(result, milliseconds), is_last=is_final(result))


# The model whose config has what ``read_view`` reads.
VIEW_MODEL = "preprocess"


def read_view(config: Any) -> View:
    """The classifier's view of an image, from the config of ``VIEW_MODEL``, a ``ModelConfig`` of Triton's.

    Raises:
        ExplainError: the config is that of another model.
    """
    dims = {tensor.name: tensor.dims for tensor in config.output}
    if len(dims.get("PIXELS", ())) != 3:
        raise ExplainError(f"the server's model {VIEW_MODEL!r} has no images PIXELS: serve this project's repository")
    channels, height, width = dims["PIXELS"]
    settings = {name: parameter.string_value for name, parameter in config.parameters.items()}
    sides = [int(side) for side in settings.get("resize", str(DEFAULT_VIEW.resize)).split(",")]
    resize = sides[0] if len(sides) == 1 else (sides[0], sides[1])
    interpolation = settings.get("interpolation", DEFAULT_VIEW.interpolation)
    return View(resize, (height, width), interpolation, channels)


def network_call() -> Call:
    """A request for the network's name."""
    return Call(VIEW_MODEL, [_image(_BLANK)], [triton.InferRequestedOutput("NETWORK")], {})


def read_network(result: triton.InferResult) -> Network:
    """The answer to ``network_call``."""
    return Network(**json.loads(result.as_numpy("NETWORK")[0, 0]))


def is_final(result: triton.InferResult) -> bool:
    """Whether a response ends its stream."""
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def _classification(call: Call, result: triton.InferResult, row: int = 0) -> tuple[tuple[Prediction, ...], int]:
    """The predictions and the explained class.

    Where that is the predicted one it comes first. The server takes the largest logit; Triton sorts the probabilities,
    which may tie where the logits do not.
    """
    predictions, explained = read_predictions(result, row), int(result.as_numpy("EXPLAINED_CLASS")[row, 0])
    if call.explains_prediction:
        predictions = tuple(sorted(predictions, key=lambda prediction: prediction.index != explained))
    return predictions, explained


def _attribution(result: triton.InferResult, milliseconds: float, row: int = 0) -> dict[str, Any]:
    delta, steps, error = (result.as_numpy(name)[row, 0] for name in _SCALARS)
    tensors = {name: result.as_numpy(output) for name, output in TENSORS.items()}
    return {
        "convergence_delta": float(delta),
        "n_steps": int(steps),
        "error_estimate": float(error),
        "milliseconds": milliseconds,
        "saliency": None if tensors["saliency"] is None else tensors["saliency"][row],
        "attributions": None if tensors["attributions"] is None else tensors["attributions"][row],
        "heatmap_png": None if tensors["heatmap"] is None else bytes(tensors["heatmap"][row, 0]),
    }


def _image(image: ImageSource, rows: int = 1) -> triton.InferInput:
    tensor = triton.InferInput("IMAGE", [rows, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[encoded(image)]] * rows, np.object_))
    return tensor


def _classes(top_k: int) -> triton.InferRequestedOutput:
    return triton.InferRequestedOutput("PROBABILITIES", class_count=top_k)
