"""Triton model, decoupled: an image's prediction at once, then attributions that sharpen level by level.

A stream is walked by tasks, one for the prediction and one for each level, so that a thread is taken only while there
is something to wait for, and streams take turns. Predictions have threads of their own.
"""

from __future__ import annotations  # the types of pb_utils are not there yet when this is read

import json
import math
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import triton_python_backend_utils as pb_utils
from stream_levels import Attribution, Sharpening, plan_levels

ATTRIBUTION_OUTPUTS = ("ATTRIBUTIONS", "SALIENCY", "CONVERGENCE_DELTA", "N_STEPS", "ERROR_ESTIMATE", "HEATMAP")
ATTRIBUTION_ANSWERS = ("ATTRIBUTIONS", "CONVERGENCE_DELTA", "N_STEPS", "ERROR_ESTIMATE", "WEIGHT_SUM")
# What `integrated_gradients` takes; other values are passed on, to be refused there.
LEAST_DEADLINE_MS, MOST_DEADLINE_MS = 1.0, 60_000.0


class StreamError(Exception):
    """What ends a stream: a ``pb_utils.TritonError``."""

    def __init__(self, error: pb_utils.TritonError) -> None:
        super().__init__(error.message())
        self.error = error


class _Stream:
    """A request that is being answered."""

    def __init__(self, request) -> None:
        self.arrived = time.monotonic()
        self.sender = request.get_response_sender()
        self.wanted = set(request.requested_output_names())
        self.images = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().copy()
        target = pb_utils.get_input_tensor_by_name(request, "TARGET")
        self.target = np.full((len(self.images), 1), -1, np.int64) if target is None else target.as_numpy().copy()
        sent = json.loads(request.parameters())
        self.parameters = {name: value for name, value in sent.items() if not name.startswith("triton_")}


class TritonPythonModel:
    def initialize(self, args):
        settings = json.loads(args["model_config"])["parameters"]
        self.max_streams, predicting, refining = (
            int(settings[name]["string_value"]) for name in ("max_streams", "prediction_threads", "refinement_threads")
        )
        self.predictions = ThreadPoolExecutor(predicting, "prediction")
        self.refinements = ThreadPoolExecutor(refining, "refinement")
        self.under_way, self.lock = 0, threading.Lock()

    def finalize(self):
        self.predictions.shutdown()
        self.refinements.shutdown()

    def execute(self, requests):
        for request in requests:
            with self.lock:
                is_taken = self.under_way < self.max_streams
                self.under_way += is_taken
            if not is_taken:
                message = f"{self.max_streams} streams are under way, which is the most this server takes"
                error = pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE)
                _refuse(request.get_response_sender(), error)
                continue
            stream = _Stream(request)
            self.predictions.submit(self._advance, stream, self._answer(stream))

    def _advance(self, stream: _Stream, answer: Iterator[tuple[dict[str, np.ndarray], bool]]) -> None:
        """Do a stream's next task and line up for the one after it; whatever happens, a stream gets its end."""
        error = None
        try:
            outputs, is_last = next(answer)
            _send(stream, outputs, is_last)
            if not is_last:
                self.refinements.submit(self._advance, stream, answer)
                return
        except StreamError as failure:
            error = failure.error
        except Exception as failure:  # anything else would leave the client waiting for ever
            pb_utils.Logger.log_error(f"explain_stream failed: {traceback.format_exc()}")
            error = pb_utils.TritonError(f"explain_stream failed: {failure!r}", pb_utils.TritonError.INTERNAL)
        with self.lock:
            self.under_way -= 1
        if error is not None:
            _refuse(stream.sender, error)

    def _answer(self, stream: _Stream) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
        """The outputs of each response to a stream, and whether it is the last.

        Between the requests of one level it yields no outputs, for others to have their turn.
        """
        pixels, logits, probabilities, target = self._predict(stream)
        yield (
            {"PROBABILITIES": probabilities, "EXPLAINED_CLASS": target},
            not stream.wanted.intersection(ATTRIBUTION_OUTPUTS),
        )
        levels = plan_levels(stream.parameters)
        sharpening = Sharpening()
        for level in levels:
            answers = []
            for parameters in level.requests:
                if answers:
                    yield {}, False
                if stream.sender.is_cancelled():
                    raise StreamError(pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED))
                inputs = {"PIXELS": pixels, "LOGITS": logits, "TARGET": target}
                found = self._ask(
                    "integrated_gradients", inputs, ATTRIBUTION_ANSWERS, _with_time_left(parameters, stream)
                )
                answers.append(Attribution(*(found[name] for name in ATTRIBUTION_ANSWERS)))
            is_last = level is levels[-1] or _time_left_ms(stream) <= 0
            yield self._outputs(stream, pixels, sharpening.take(answers, level, is_last)), is_last

    def _predict(self, stream: _Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pixels [n, 3, height, width], logits and probabilities [n, classes], and explained classes [n, 1]."""
        pixels = self._ask("preprocess", {"IMAGE": stream.images}, ("PIXELS",))["PIXELS"]
        found = self._ask("classifier", {"INPUT__0": pixels}, ("OUTPUT__0", "OUTPUT__1"))
        logits = found["OUTPUT__0"]
        classes = logits.shape[1]
        wrong = stream.target[(stream.target < -1) | (stream.target >= classes)]
        if wrong.size:
            message = f"TARGET must be from -1 (the predicted class) to {classes - 1}, not {wrong[0]}"
            raise StreamError(pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        target = np.where(stream.target == -1, logits.argmax(axis=1)[:, None], stream.target)
        return pixels, logits, found["OUTPUT__1"], target

    def _outputs(self, stream: _Stream, pixels: np.ndarray, found: Attribution) -> dict[str, np.ndarray]:
        saliency = found.attributions.sum(axis=1)
        outputs = {
            "ATTRIBUTIONS": found.attributions,
            "SALIENCY": saliency,
            "CONVERGENCE_DELTA": found.convergence_delta,
            "N_STEPS": found.n_steps,
            "ERROR_ESTIMATE": found.error_estimate,
        }
        if "HEATMAP" in stream.wanted:
            inputs = {"PIXELS": pixels, "RELEVANCE": saliency}
            outputs |= self._ask("heatmap", inputs, ("HEATMAP",), stream.parameters)
        return outputs

    def _ask(
        self, model: str, inputs: dict, outputs: tuple[str, ...], parameters: Mapping = MappingProxyType({})
    ) -> dict[str, np.ndarray]:
        """Another model's answer; what it refuses ends the stream."""
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            # Triton 2.51 takes no float here; all parameters may be strings.
            parameters={name: repr(value) if isinstance(value, float) else value for name, value in parameters.items()},
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise StreamError(response.error())
        return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}


def _time_left_ms(stream: _Stream) -> float:
    """Of a stream's deadline, which counts from its arrival; infinite without one, or with one that will be refused."""
    deadline_ms = stream.parameters.get("deadline_ms")
    try:
        is_valid = not isinstance(deadline_ms, bool) and LEAST_DEADLINE_MS <= float(deadline_ms) <= MOST_DEADLINE_MS
    except (TypeError, ValueError):
        is_valid = False
    return float(deadline_ms) - 1000 * (time.monotonic() - stream.arrived) if is_valid else math.inf


def _with_time_left(parameters: Mapping, stream: _Stream) -> Mapping:
    """Parameters whose deadline counts from the stream's arrival, as ones whose deadline counts from now."""
    left = _time_left_ms(stream)
    return parameters if math.isinf(left) else {**parameters, "deadline_ms": str(max(LEAST_DEADLINE_MS, left))}


def _send(stream: _Stream, outputs: dict[str, np.ndarray], is_last: bool) -> None:
    """A response with the wanted ones of some outputs, if there are any; the last in any case."""
    tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in stream.wanted]
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
    if tensors or is_last:
        stream.sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)


def _refuse(sender: pb_utils.ResponseSender, error: pb_utils.TritonError) -> None:
    """The response that ends a stream with an error."""
    response = pb_utils.InferenceResponse(error=error)
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
