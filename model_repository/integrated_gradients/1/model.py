"""Triton model: Integrated Gradients of the classifier's own TorchScript file, for batches of unlike requests."""

from __future__ import annotations  # the types of pb_utils are not there yet when this is read

import contextlib
import hashlib
import json
import math
import os
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from attribution_engine import Explanation, Job
from attribution_metrics import AttributionMetrics
from attribution_parameters import AttributionParameters, Limits, ParameterError, parse_parameters
from engine_loading import build_engine
from gradient_worker import GradientWorker, OverloadedError
from overload_notice import OverloadNotice
from path_baselines import Baselines
from path_density import FILE_NAME, CalibrationError, PathDensity

# Normalised pixels lie within 3 or so. Numbers so large that they overflow on the way would reach the rows beside them.
LARGEST_PIXEL = 1e4
# How often Triton is asked whether a request has been cancelled.
CANCELLATION_SECONDS = 0.05
LAST_WORDS_SECONDS = 0.5
# How its answers begin when it takes no more.
OVERLOADED = "integrated_gradients is overloaded"


class TensorError(ValueError):
    """A tensor of a request holds what cannot be explained; the message names it."""


@dataclass(frozen=True)
class Work:
    """One valid request: ``pixels`` [n, 3, height, width] and ``logits`` [n, classes] tensors, ``targets`` resolved."""

    pixels: torch.Tensor
    logits: torch.Tensor
    targets: list[int]
    parameters: AttributionParameters


class _Answer:
    """What is known of the answer to a request, and the way back to it."""

    def __init__(self, request, arrived: float) -> None:
        self._sender = request.get_response_sender()
        self.arrived = arrived
        self.timeout_seconds = request.timeout() / 1e6 or math.inf
        self.is_sent = threading.Event()
        self.wanted = set(request.requested_output_names())
        self.work: Work | None = None
        self.explanations: dict[int, Explanation | None] = {}  # by an image's place in the request
        self._is_cancelled, self._asked = False, 0.0

    @property
    def is_complete(self) -> bool:
        """Whether there is a word on all images."""
        return len(self.explanations) == len(self.work.targets)

    def is_late(self) -> bool:
        """Whether the request's timeout is over."""
        return time.monotonic() >= self.arrived + self.timeout_seconds

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled it; Triton is not asked before each of a GPU's passes."""
        if not self._is_cancelled and time.monotonic() >= self._asked + CANCELLATION_SECONDS:
            self._is_cancelled, self._asked = self._sender.is_cancelled(), time.monotonic()
        return self._is_cancelled

    def is_unwanted(self) -> bool:
        """Whether nobody waits for it any more."""
        return not self.is_sent.is_set() and (self.is_late() or self.is_cancelled())

    def send(self, response: pb_utils.InferenceResponse) -> None:
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.is_sent.set()

    def refuse(self, message: str, code: int) -> None:
        """Answer with an error: ``code`` is one of ``pb_utils.TritonError``'s."""
        self.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)))


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.limits = Limits(*(int(settings[name]) for name in ("max_n_steps", "max_nt_samples", "max_gradients")))
        self.foreign_parameters = {name.strip() for name in settings["foreign_parameters"].split(",")}
        # Where an MPS daemon runs on the GPU; read when CUDA starts.
        os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", settings["cuda_mps_client_priority"])
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"])) if on_gpu else torch.device("cpu")
        # The very file that the classifier serves: same repository, same version.
        file = Path(args["model_repository"]).parent / "classifier" / args["model_version"] / "model.pt"
        if not file.is_file():
            raise pb_utils.TritonModelException(f"{file} is missing; python -m tools.export writes it")
        if not on_gpu:
            os.nice(int(settings["cpu_niceness"]))
            if threads := int(settings["cpu_threads"]):
                torch.set_num_threads(threads)
        shape = next(tensor["dims"] for tensor in config["input"] if tensor["name"] == "PIXELS")
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        # The classifier's own, as `tools/export` wrote it beside it; of a file from elsewhere, the settings.
        manifest = file.with_name("manifest.json")
        written = json.loads(manifest.read_text()) if manifest.is_file() else {}
        own = written["preprocessing"] if written.get("model_sha256") == checksum else {}
        self.baselines = Baselines(
            *(own.get(name) or [float(value) for value in settings[name].split(",")] for name in ("mean", "std"))
        )
        density, self.uncalibrated = None, ""
        try:
            density = PathDensity.load(file.with_name(FILE_NAME), checksum)
        except CalibrationError as error:
            self.uncalibrated = str(error)
        self.engine = build_engine(file, self.device, shape, int(settings["max_rows"]), settings["precision"], density)
        with torch.no_grad():
            example = self.engine.network(torch.zeros(1, *shape, device=self.device))
        if not example.isfinite().all():
            raise pb_utils.TritonModelException(f"{file} answers an image with logits that are not finite")
        self.classes = example.shape[1]
        self.hold_seconds = float(settings["hold_seconds"])
        self.max_wait_seconds = float(settings["max_wait_seconds"])
        self.chunks_counted: Counter[int] = Counter()
        # Of several instances another may still have room.
        groups = config["instance_group"]
        instances = sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in groups)
        self.notice = OverloadNotice(os.getppid()) if instances == 1 else None
        # Last, so that nothing fails after it; it inherits this thread's niceness.
        self.worker = GradientWorker(
            self.engine, self.device, self.max_wait_seconds, int(settings["max_waiting_images"])
        )
        # Each process has metrics of its own: Triton would drop shared ones with the first that unloads.
        labels = {"instance": args["model_instance_name"], "pid": str(os.getpid())}
        self.metrics = AttributionMetrics(_metric_family, labels, lambda: self.worker.waiting, self._count_chunks)
        pb_utils.Logger.log_info(
            f"integrated_gradients explains {file}, sha256 {checksum}, "
            f"on {self.device}, {self.engine.max_rows} rows a chunk, {self.uncalibrated or 'calibrated'}"
        )

    def execute(self, requests):
        """Hand requests to the thread that computes; return when they are answered, or have been for a while.

        While this waits, what comes next gathers in Triton. A long request must not keep short ones there until its
        end, so others join it after ``hold_seconds``, and at once where the batch itself has longer to wait for its
        first gradient; Triton takes its answer after this has returned, too.
        """
        arrived = time.monotonic()
        answers = [_Answer(request, arrived) for request in requests]
        wait = 0.0
        for request, answer in zip(requests, answers):
            # Triton must not see an exception: it would answer again what has been answered, and free it twice.
            try:
                wait = max(wait, self._take(request, answer))
            except (ParameterError, TensorError) as refusal:
                self._refuse(answer, str(refusal), pb_utils.TritonError.INVALID_ARG, "invalid")
            except OverloadedError as refusal:
                wait = math.inf
                if self.notice is not None and refusal.rows is not None:
                    self.notice.post(refusal.rows, refusal.seconds)
                self._refuse(answer, f"{OVERLOADED}: {refusal}", pb_utils.TritonError.UNAVAILABLE, "overloaded")
            except Exception as failure:
                self._fail(answer, failure)
        if wait > self.hold_seconds:  # and so will what gathers behind this batch, which should be judged at once
            return [None] * len(requests)
        for answer in answers:
            answer.is_sent.wait(max(0.0, arrived + self.hold_seconds - time.monotonic()))
        return [None] * len(requests)

    def _take(self, request, answer: _Answer) -> float:
        """Have a request explained; returns the seconds until its first gradient."""
        answer.work = self._read(request)
        return self.worker.submit(self._jobs(answer.work, answer), partial(self._done, answer))

    def _done(self, answer: _Answer, number: int, found: Explanation | Exception | None) -> None:
        """In the worker's thread: an image of a request is done; with the last one it is answered."""
        if answer.is_sent.is_set():
            return  # another of its images failed
        try:
            if isinstance(found, Exception):
                raise found
            answer.explanations[number] = found
            if answer.is_complete:
                self._respond(answer)
        except Exception as failure:
            self._fail(answer, failure)

    def _fail(self, answer: _Answer, failure: Exception) -> None:
        """Answer for an error of this model's own."""
        pb_utils.Logger.log_error(f"integrated_gradients failed: {traceback.format_exc()}")
        with contextlib.suppress(Exception):  # where not even an error can be sent, the others still have a right
            message = f"integrated_gradients failed: {failure!r:.200}"
            self._refuse(answer, message, pb_utils.TritonError.INTERNAL, "failed")
        if isinstance(failure, torch.AcceleratorError):  # nothing works in this process after it
            threading.Thread(target=self._end_process, daemon=True).start()

    def _refuse(self, answer: _Answer, message: str, code: int, outcome: str) -> None:
        self.metrics.count("requests_total", outcome=outcome)
        answer.refuse(message, code)

    def _end_process(self) -> None:
        """After an error of the device: Triton then calls this model not healthy, and whoever probes restarts it."""
        pb_utils.Logger.log_error("integrated_gradients ends: its device has failed")
        time.sleep(LAST_WORDS_SECONDS)  # answers are on their way, and metrics
        os._exit(1)

    def finalize(self):
        self.worker.close()
        self.metrics.close()
        if self.notice is not None:
            self.notice.remove()

    def _count_chunks(self) -> None:
        """Tell the metrics of the passes since the last time; in their thread."""
        new = Counter(dict(self.engine.chunks_passed)) - self.chunks_counted
        self.chunks_counted += new
        for rows, times in new.items():
            self.metrics.count("rows_total", rows * times)
            self.metrics.count("chunks_total", times)
            self.metrics.observe("chunk_fill", rows / self.engine.max_rows, times)

    def _count_explanations(self, answer: _Answer, explanations: list[Explanation], gaps: np.ndarray) -> None:
        """Tell the metrics of a request; ``gaps`` [n] are relative to the sums of absolute attributions."""
        asked = answer.work.parameters
        method = (asked.deadline_ms and "deadline") or (asked.tolerance and "tolerance") or asked.method
        self.metrics.count("requests_total", outcome="explained")
        for explanation, gap in zip(explanations, gaps.tolist()):
            self.metrics.count("explanations_total", method=method)
            self.metrics.observe("steps", explanation.n_steps, method=method)
            self.metrics.observe("convergence_gap", gap, method=method)
            self.metrics.observe("error_estimate", explanation.error_estimate, method=method)
            self.metrics.observe("wait_seconds", max(0.0, explanation.started - answer.arrived))
            self.metrics.observe("compute_seconds", explanation.seconds, method=method)

    def _read(self, request) -> Work:
        """The request as work to do.

        Raises:
            ParameterError, TensorError: it is not valid.
        """
        parameters = parse_parameters(json.loads(request.parameters()), self.limits, self.foreign_parameters)
        if parameters.method == "calibrated" and self.uncalibrated:
            raise ParameterError(f"parameter 'method' must not be 'calibrated': {self.uncalibrated}")
        pixels, logits = (
            # A copy: what Triton shares with this process is its own again when `execute` returns.
            torch.tensor(pb_utils.get_input_tensor_by_name(request, name).as_numpy())
            for name in ("PIXELS", "LOGITS")
        )
        if pixels.dim() != 4 or logits.dim() != 2:  # what Triton 2.51 makes of a batch of none
            raise TensorError("PIXELS and LOGITS must be at least one")
        parameters.check_cost(len(pixels), self.limits)
        if logits.shape[1] != self.classes:
            raise TensorError(f"LOGITS must be of the classifier's {self.classes} classes, not {logits.shape[1]}")
        for name, values in (("PIXELS", pixels), ("LOGITS", logits)):
            if not values.isfinite().all():
                raise TensorError(f"{name} must be finite")
        largest = pixels.abs().max().item()
        if largest > LARGEST_PIXEL:
            raise TensorError(f"PIXELS must be from {-LARGEST_PIXEL:g} to {LARGEST_PIXEL:g}, not up to {largest:g}")
        target = pb_utils.get_input_tensor_by_name(request, "TARGET")
        wanted = [-1] * len(pixels) if target is None else target.as_numpy()[:, 0].tolist()
        for index in wanted:
            if not -1 <= index < self.classes:
                raise TensorError(f"TARGET must be from -1 (the predicted class) to {self.classes - 1}, not {index}")
        predicted = logits.argmax(dim=1).tolist()
        targets = [best if index == -1 else index for index, best in zip(wanted, predicted)]
        if parameters.contrast is not None:
            if parameters.contrast >= self.classes:
                raise ParameterError(
                    f"parameter 'contrast' must be from 0 to {self.classes - 1}, not {parameters.contrast}"
                )
            if parameters.contrast in targets:
                raise ParameterError(f"parameter 'contrast' must not be the explained class, {parameters.contrast}")
        return Work(pixels.to(self.device), logits.to(self.device), targets, parameters)

    def _jobs(self, work: Work, answer: _Answer) -> list[Job]:
        asked = work.parameters
        deadline = None if asked.deadline_ms is None else answer.arrived + asked.deadline_ms / 1000
        return [
            Job(
                image=image,
                baseline=self.baselines.make(asked.baseline, image, asked.seed),
                target=target,
                n_steps=asked.n_steps,
                method=asked.method,
                tolerance=asked.tolerance,
                deadline=deadline,
                part=asked.part,
                parts=asked.parts,
                probability=asked.output == "probability",
                contrast=asked.contrast,
                nt_samples=asked.nt_samples,
                stdevs=asked.stdevs if asked.smooths else 0.0,
                seed=asked.seed,
                image_logits=logits,
                baseline_key=asked.baseline if asked.baseline in Baselines.CONSTANT else None,
                is_cancelled=answer.is_unwanted,
            )
            for image, logits, target in zip(work.pixels, work.logits, work.targets)
        ]

    def _respond(self, answer: _Answer) -> None:
        """Answer a request all of whose images are explained or given up."""
        work = answer.work
        explanations = [answer.explanations[number] for number in range(len(work.targets))]
        if None in explanations:
            if answer.is_late():
                message = f"the request's timeout of {answer.timeout_seconds:g} s is over"
                self._refuse(answer, message, pb_utils.TritonError.UNAVAILABLE, "late")
            elif answer.is_cancelled():
                self._refuse(answer, "the request was cancelled", pb_utils.TritonError.CANCELLED, "cancelled")
            else:
                message = f"{OVERLOADED}: the request has waited {self.max_wait_seconds:g} s for its first gradient"
                self._refuse(answer, message, pb_utils.TritonError.UNAVAILABLE, "overloaded")
            return
        attributions = torch.stack([explanation.attributions for explanation in explanations]).cpu().numpy()
        if not np.isfinite(attributions).all():
            raise ArithmeticError("the gradients are not finite")
        saliency = attributions.sum(axis=1)
        deltas = torch.stack([explanation.convergence_delta for explanation in explanations]).cpu().numpy()
        sizes = np.abs(attributions).sum(axis=(1, 2, 3))
        self._count_explanations(answer, explanations, np.abs(deltas) / np.maximum(sizes, 1e-12))
        outputs = {
            "EXPLAINED_CLASS": np.array(work.targets, np.int64)[:, None],
            "ATTRIBUTIONS": attributions,
            "SALIENCY": saliency,
            "CONVERGENCE_DELTA": deltas[:, None],
            "N_STEPS": np.array([[explanation.n_steps] for explanation in explanations], np.int32),
            "ERROR_ESTIMATE": np.array([[explanation.error_estimate] for explanation in explanations], np.float32),
            "WEIGHT_SUM": np.array([[explanation.weight_sum] for explanation in explanations], np.float32),
            "RELEVANCE": saliency,
        }
        answer.send(
            pb_utils.InferenceResponse(
                output_tensors=[
                    pb_utils.Tensor(name, array) for name, array in outputs.items() if name in answer.wanted
                ]
            )
        )


def _metric_family(name: str, description: str, is_gauge: bool) -> pb_utils.MetricFamily | None:
    """A family of Triton's own; none from a server without metrics."""
    kind = pb_utils.MetricFamily.GAUGE if is_gauge else pb_utils.MetricFamily.COUNTER
    try:
        return pb_utils.MetricFamily(name=name, description=description, kind=kind)
    except pb_utils.TritonModelException as error:
        pb_utils.Logger.log_warn(f"no metric {name}: {error}")
        return None
