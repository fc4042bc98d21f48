"""Triton model, decoupled: an image's prediction at once, then attributions that get more exact level by level.

A stream is answered by tasks: one for the prediction and one for each request of a level. A stream holds a thread only
while a task runs, and streams take turns. Predictions have threads of their own.
"""

from __future__ import annotations  # pb_utils has its types only inside Triton

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# The modules that all models share.
sys.path.append(str(Path(__file__).resolve().parents[2] / "integrated_gradients" / "1"))

from error_codes import code_of, outcome_of, triton_error, with_status
from metric_families import metric_family
from probe_requests import is_probe
from request_parameters import is_of_triton
from stream_levels import LevelAccumulator, LevelAnswer, plan_stream

ATTRIBUTION_OUTPUTS = ("ATTRIBUTIONS", "SALIENCY", "CONVERGENCE_DELTA", "N_STEPS", "ERROR_ESTIMATE", "HEATMAP")
ATTRIBUTION_ANSWERS = ("ATTRIBUTIONS", "CONVERGENCE_DELTA", "N_STEPS", "ERROR_ESTIMATE", "WEIGHT_SUM")

# The contract has about twenty parameters; each part of a stream is requested with all of them.
MOST_PARAMETERS = 64
# The shortest deadline that `integrated_gradients` takes.
LEAST_DEADLINE_MS = 1.0


class StreamError(Exception):
    """Ends a stream with its ``error``, a ``pb_utils.TritonError``."""

    def __init__(self, error: pb_utils.TritonError) -> None:
        super().__init__(error.message())
        self.error = error


class _Stream:
    """A request under way.

    Raises:
        StreamError: the request is too large, or has no image.
    """

    def __init__(self, request: Any, sender: Any, max_bytes: int) -> None:
        self.arrived = time.monotonic()
        self.is_probe = is_probe(request)
        self.sender = sender
        self.timeout_seconds = request.timeout() / 1e6 or math.inf
        self.wanted = set(request.requested_output_names())
        self.images = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().copy()
        if self.images.ndim != 2:  # Triton 2.51 drops the batch dimension of an empty batch
            raise _refusal("IMAGE must be at least one")
        size = sum(map(len, self.images[:, 0]))
        if size > max_bytes:
            raise _refusal(f"IMAGE has {size} bytes in {len(self.images)} images; a stream takes at most {max_bytes}")
        target = pb_utils.get_input_tensor_by_name(request, "TARGET")
        self.target = np.full((len(self.images), 1), -1, np.int64) if target is None else target.as_numpy().copy()
        sent = json.loads(request.parameters())
        if len(sent) > MOST_PARAMETERS:
            raise _refusal(f"parameter count must be at most {MOST_PARAMETERS}, not {len(sent)}")
        self.parameters = {name: value for name, value in sent.items() if not is_of_triton(name)}
        self.plan = plan_stream(self.parameters)

    def check_wanted(self) -> None:
        """Check that the client still waits.

        Raises:
            StreamError: the stream was cancelled, or its timeout is over.
        """
        if self.sender.is_cancelled():
            raise StreamError(triton_error("cancelled", "the request was cancelled"))
        if self.timeout_left() <= 0:
            raise StreamError(self.timeout_error())

    def timeout_error(self) -> pb_utils.TritonError:
        return triton_error("late", f"the request's timeout of {self.timeout_seconds:g} s is over")

    def timeout_left(self) -> float:
        """Seconds left of the request's timeout; infinite without one."""
        return self.timeout_seconds - (time.monotonic() - self.arrived)

    def deadline_left_ms(self) -> float:
        """Milliseconds left of the deadline; infinite without one."""
        return self.plan.deadline_ms - 1000 * (time.monotonic() - self.arrived)

    def with_time_left(self, parameters: Mapping) -> Mapping:
        """The same parameters with the deadline counted from now instead of from the stream's arrival."""
        left = self.deadline_left_ms()
        return parameters if math.isinf(left) else {**parameters, "deadline_ms": str(max(LEAST_DEADLINE_MS, left))}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = json.loads(args["model_config"])["parameters"]
        names = ("max_streams", "max_stream_bytes", "prediction_threads", "refinement_threads")
        self.max_streams, self.max_bytes, predicting, refining = (int(settings[name]["string_value"]) for name in names)
        self.predictions = ThreadPoolExecutor(predicting, "prediction")
        self.refinements = ThreadPoolExecutor(refining, "refinement")
        self.under_way, self.lock = 0, threading.Lock()
        description = "Streams by outcome: explained, invalid, overloaded, late, cancelled, failed"
        # By whether a stream is a health check's.
        self.families = {
            False: metric_family("explain_stream_streams_total", description),
            True: metric_family("explain_stream_probes_total", "Streams of health checks by outcome"),
        }
        self.labels = {"instance": args["model_instance_name"], "pid": str(os.getpid()), "model": args["model_name"]}
        self.metrics: dict[tuple[bool, str], Any] = {}
        self.metrics_lock = threading.Lock()

    def finalize(self) -> None:
        self.predictions.shutdown()
        self.refinements.shutdown()
        self.metrics.clear()  # first: a metric must not outlive its family
        self.families.clear()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            with self.lock:
                is_taken = self.under_way < self.max_streams
                self.under_way += is_taken
            if not is_taken:
                message = f"the most streams that this server takes, {self.max_streams}, are under way"
                _refuse(sender, triton_error("overloaded", message))
                self._count(is_probe(request), "overloaded")
                continue
            try:
                stream = _Stream(request, sender, self.max_bytes)
            except Exception as failure:  # Triton would leave the client waiting for ever
                self._end(sender, is_probe(request), failure)
                continue
            self.predictions.submit(self._advance, stream, self._answer(stream))

    def _advance(self, stream: _Stream, answer: Iterator[tuple[dict[str, np.ndarray], bool]]) -> None:
        """Run a stream's next task and queue the one after it; end the stream after the last one or a failure."""
        try:
            outputs, is_last = next(answer)
            _send(stream, outputs, is_last)
            if not is_last:
                self.refinements.submit(self._advance, stream, answer)
                return
        except Exception as failure:  # without an answer the client would wait for ever
            self._end(stream.sender, stream.is_probe, failure)
        else:
            self._end(stream.sender, stream.is_probe)

    def _end(self, sender: Any, is_probe: bool, failure: Exception | None = None) -> None:
        """Count a stream as ended, and answer with its error if it failed."""
        with self.lock:
            self.under_way -= 1
        outcome = "explained"
        if failure is not None:
            error = failure.error if isinstance(failure, StreamError) else _internal_error(failure)
            outcome = outcome_of(error)
            _refuse(sender, error)
        self._count(is_probe, outcome)

    def _count(self, is_probe: bool, outcome: str) -> None:
        """Count an ended stream in Triton's metrics."""
        family = self.families[is_probe]
        if family is None:
            return
        # Locked: a metric that two threads update at once makes Triton 2.51 read freed memory.
        with self.metrics_lock:
            if (is_probe, outcome) not in self.metrics:
                self.metrics[is_probe, outcome] = family.Metric(labels={**self.labels, "outcome": outcome})
            self.metrics[is_probe, outcome].increment(1)

    def _answer(self, stream: _Stream) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
        """The outputs of each response to a stream, and whether it is the last.

        Between the requests of a level it yields no outputs, so that other streams have their turn.
        """
        pixels, logits, probabilities, target = self._predict(stream)
        yield (
            {"PROBABILITIES": probabilities, "EXPLAINED_CLASS": target},
            not stream.wanted.intersection(ATTRIBUTION_OUTPUTS),
        )
        accumulator = LevelAccumulator()
        levels = stream.plan.levels
        for level in levels:
            answers: list[LevelAnswer] = []
            for parameters in level.requests:
                if answers:
                    yield {}, False
                inputs = {"PIXELS": pixels, "LOGITS": logits, "TARGET": target}
                outputs = self._ask(
                    stream, "integrated_gradients", inputs, ATTRIBUTION_ANSWERS, stream.with_time_left(parameters)
                )
                answers.append(LevelAnswer(*(outputs[name] for name in ATTRIBUTION_ANSWERS)))
            is_last = level is levels[-1] or stream.deadline_left_ms() <= 0
            yield self._outputs(stream, pixels, accumulator.take(answers, level, is_last)), is_last

    def _predict(self, stream: _Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pixels [n, channels, height, width], logits and probabilities [n, classes], and explained classes [n, 1]."""
        pixels = self._ask(stream, "preprocess", {"IMAGE": stream.images}, ("PIXELS",))["PIXELS"]
        stream.images = None  # frees the files, which may be large, while the stream waits for its turns
        classified = self._ask(stream, "classifier", {"INPUT__0": pixels}, ("OUTPUT__0", "OUTPUT__1"))
        logits = classified["OUTPUT__0"]
        classes = logits.shape[1]
        wrong = stream.target[(stream.target < -1) | (stream.target >= classes)]
        if wrong.size:
            raise _refusal(f"TARGET must be from -1 (the predicted class) to {classes - 1}, not {wrong[0]}")
        target = np.where(stream.target == -1, logits.argmax(axis=1)[:, None], stream.target)
        return pixels, logits, classified["OUTPUT__1"], target

    def _outputs(self, stream: _Stream, pixels: np.ndarray, answer: LevelAnswer) -> dict[str, np.ndarray]:
        saliency = answer.attributions.sum(axis=1)
        outputs = {
            "ATTRIBUTIONS": answer.attributions,
            "SALIENCY": saliency,
            "CONVERGENCE_DELTA": answer.convergence_delta,
            "N_STEPS": answer.n_steps,
            "ERROR_ESTIMATE": answer.error_estimate,
        }
        if "HEATMAP" in stream.wanted:
            inputs = {"PIXELS": pixels, "RELEVANCE": saliency}
            outputs |= self._ask(stream, "heatmap", inputs, ("HEATMAP",), stream.parameters)
        return outputs

    def _ask(
        self,
        stream: _Stream,
        model: str,
        inputs: Mapping[str, np.ndarray],
        outputs: tuple[str, ...],
        parameters: Mapping = MappingProxyType({}),
    ) -> dict[str, np.ndarray]:
        """Another model's output tensors, by name.

        Raises:
            StreamError: that model refuses the request, or the client no longer waits.
        """
        stream.check_wanted()
        left = stream.timeout_left()
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            # Triton 2.51 takes no float here; all parameters may be strings.
            parameters={name: repr(value) if isinstance(value, float) else value for name, value in parameters.items()},
            timeout=0 if math.isinf(left) else max(1, int(1e6 * left)),
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise StreamError(_with_status(response.error(), stream))
        return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}


def _with_status(error: pb_utils.TritonError, stream: _Stream) -> pb_utils.TritonError:
    """Another model's error with its original status, which Triton 2.51 replaces by INTERNAL."""
    if error.code() != pb_utils.TritonError.INTERNAL:
        return error
    code = code_of(error.message())
    if code is not None:
        return with_status(code, error.message())
    return stream.timeout_error() if stream.timeout_left() <= 0 else error  # Triton's own message has no code


def _refusal(message: str) -> StreamError:
    return StreamError(triton_error("invalid", message))


def _internal_error(failure: Exception) -> pb_utils.TritonError:
    """Log the exception being handled and return the answer to it."""
    pb_utils.Logger.log_error(f"explain_stream failed: {traceback.format_exc()}")
    return triton_error("failed", f"explain_stream failed: {failure!r:.200}")


def _send(stream: _Stream, outputs: dict[str, np.ndarray], is_last: bool) -> None:
    """Send a response with the requested ones of ``outputs``; one without outputs is sent only if it is the last."""
    tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in stream.wanted]
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
    if tensors or is_last:
        stream.sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)


def _refuse(sender: Any, error: pb_utils.TritonError) -> None:
    """Send the response that ends a stream with an error."""
    response = pb_utils.InferenceResponse(error=error)
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
