"""Triton model: Integrated Gradients of the classifier's own TorchScript file, for batches of different requests."""

from __future__ import annotations  # pb_utils has its types only inside Triton

import contextlib
import math
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from attribution_job import Explanation
from attribution_metrics import AttributionMetrics
from attribution_parameters import Limits
from attribution_request import Reply, RequestReader, TensorError, Work, response_outputs
from circuit_breaker import CircuitBreaker
from classifier_files import ClassifierFiles
from classifier_loading import check_classifier, check_gradients, load_classifier
from cpu_quota import threads
from engine_loading import build_engine
from gradient_worker import GradientWorker
from kept_answers import AnswerStore
from load_errors import refusing_to_load
from metric_families import metric_family
from model_setup import ModelSetup
from path_baselines import IMAGES_FILE, BaselineError, Baselines, load_images
from path_density import FILE_NAME, CalibrationError, PathDensity
from request_admission import Admission, OverloadedError
from request_parameters import ParameterError
from response_cache import refuse_caches_around
from shared_answers import SharedAnswers

# Time for the last answers and metrics to be sent before the process ends.
LAST_WORDS_SECONDS = 0.5


@dataclass(eq=False)
class _Request:
    """A valid request under way: its work, its reply and the explanations so far, by index of the image."""

    work: Work
    reply: Reply
    explanations: dict[int, Explanation | None] = field(default_factory=dict)


class TritonPythonModel:
    @refusing_to_load()
    def initialize(self, args: dict[str, str]) -> None:
        setup = ModelSetup.read(args)
        settings, files, shape = setup.settings, setup.files, setup.preprocessing.input_shape
        refuse_caches_around(args["model_repository"])
        # For GPUs with an MPS daemon; CUDA reads it when it starts.
        os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", settings["cuda_mps_client_priority"])
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"])) if on_gpu else torch.device("cpu")
        if not on_gpu:
            os.nice(int(settings["cpu_niceness"]))
            torch.set_num_threads(int(settings["cpu_threads"]) or threads())
        try:
            density: PathDensity | None = PathDensity.load(files.folder / FILE_NAME, files.sha256)
        except CalibrationError:
            density = None
        max_rows, precision = int(settings["max_rows"]), settings["precision"]
        module = load_classifier(files.model, self.device)
        classes = check_classifier(module, files.model, shape, self.device)
        winograd = bool(int(settings["cpu_winograd"]))
        check = partial(check_gradients, file=files.model, image_shape=shape, device=self.device)
        self.engine = build_engine(module, self.device, shape, max_rows, precision, density, winograd, check)
        try:
            images: Sequence[torch.Tensor] = load_images(files.folder / IMAGES_FILE, files.sha256, shape).unbind()
        except BaselineError:
            images = ()
        self.reader = RequestReader(
            self.device,
            files.sha256,
            classes,
            Limits(*(int(settings[name]) for name in ("max_n_steps", "max_nt_samples", "max_gradients"))),
            {name.strip() for name in settings["foreign_parameters"].split(",")},
            Baselines(setup.preprocessing.mean, setup.preprocessing.std, [each.to(self.device) for each in images]),
            None if len(images) else partial(_why_no_images, files, shape),
            None if density else partial(_why_uncalibrated, files),
        )
        self.hold_seconds = float(settings["hold_seconds"])
        self.chunks_counted: Counter[int] = Counter()
        self.shared_counted = 0
        # With several instances, another one may still have room, so there is no breaker.
        groups = setup.config["instance_group"]
        instances = sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in groups)
        self.breaker = CircuitBreaker(os.getppid(), self.engine.usual_rows) if instances == 1 else None
        # Last: nothing must fail once the thread runs, and it inherits this thread's niceness.
        self.admission = Admission(float(settings["max_wait_seconds"]), int(settings["max_waiting_images"]))
        self.worker = GradientWorker(self.engine, self.device, self.admission)
        store = AnswerStore(int(settings["kept_bytes"]))
        self.answers = SharedAnswers(self.worker, store, self._count_answer)
        # Each process has its own metrics: Triton would drop shared ones when the first process unloads.
        labels = {"instance": args["model_instance_name"], "pid": str(os.getpid())}
        gauges = {"waiting_images": lambda: self.answers.waiting, "kept_bytes": lambda: store.size}
        self.metrics = AttributionMetrics(metric_family, labels, gauges, self._count_chunks)
        limitation = getattr(module, "limitation", "") or "the file has no discrete ones"
        kind = "discrete" if self.engine.network.has_mean_slopes else f"those of points, because {limitation}"
        calibration = "calibrated" if density else _why_uncalibrated(files)
        winograd_layers = getattr(self.engine.network.convolutions, "layers", 0)
        pb_utils.Logger.log_info(
            f"integrated_gradients explains {files.model}, sha256 {files.sha256}, on {self.device}, "
            f"threads {torch.get_num_threads()}, {self.engine.max_rows} rows a chunk, "
            f"{winograd_layers} convolutions and input gradients by Winograd's algorithm, "
            f"gradients are {kind}, {calibration}"
        )

    def execute(self, requests: list[Any]) -> list[None]:
        """Hand requests to the worker; return when they are answered, or after ``hold_seconds``.

        While this waits, further requests gather in Triton. They must not wait there until a long request ends, so this
        returns after ``hold_seconds``, and at once if the batch itself waits longer than that for its first gradient.
        Triton accepts answers after this has returned.
        """
        arrived = time.monotonic()
        replies = [Reply(request, arrived) for request in requests]
        # Requests behind a batch that waits longer should be admitted or refused at once.
        if max(self._take(request, reply) for request, reply in zip(requests, replies)) <= self.hold_seconds:
            for reply in replies:
                reply.is_sent.wait(max(0.0, arrived + self.hold_seconds - time.monotonic()))
        return [None] * len(requests)

    def _take(self, request: Any, reply: Reply) -> float:
        """Submit a request, or refuse it; returns the seconds that it is expected to wait for its first gradient."""
        # No exception may reach Triton: it would answer requests a second time, and free them twice.
        try:
            accepted = _Request(self.reader.read(request), reply)
            return self.answers.submit(self.reader.jobs(accepted.work, reply), partial(self._done, accepted))
        except (ParameterError, TensorError) as refusal:
            self._refuse(reply, "invalid", str(refusal))
        except OverloadedError as refusal:
            if self.breaker is not None and refusal.rows is not None:
                self.breaker.open(refusal.rows, refusal.seconds)
            self._refuse(reply, "overloaded", str(refusal))
            return math.inf
        except Exception as failure:
            self._fail(reply, failure)
        return 0.0

    def _done(self, request: _Request, number: int, outcome: Explanation | Exception | None) -> None:
        """Called when an image is done, in the worker's thread or in ``submit``; the last one answers the request."""
        if request.reply.is_sent.is_set():
            return  # another image of the request failed
        try:
            if isinstance(outcome, Exception):
                raise outcome
            request.explanations[number] = outcome
            if len(request.explanations) == len(request.work.targets):
                self._respond(request)
        except Exception as failure:
            self._fail(request.reply, failure)

    def _respond(self, request: _Request) -> None:
        """Answer a request once all its images are explained or given up."""
        reply, work = request.reply, request.work
        explanations = [e for _, e in sorted(request.explanations.items()) if e is not None]
        if len(explanations) < len(work.targets):
            if reply.is_late():
                self._refuse(reply, "late", f"the request's timeout of {reply.timeout_seconds:g} s is over")
            elif reply.is_cancelled():
                self._refuse(reply, "cancelled", "the request was cancelled")
            else:
                waited = f"the request has waited {self.admission.max_wait_seconds:g} s for its first gradient"
                self._refuse(reply, "overloaded", waited)
            return
        outputs = response_outputs(work, explanations)
        self._count_explanations(request, explanations, outputs)
        reply.send(outputs)

    def _fail(self, reply: Reply, failure: Exception) -> None:
        """Answer with an internal error; end the process if the device failed."""
        pb_utils.Logger.log_error(f"integrated_gradients failed: {traceback.format_exc()}")
        with contextlib.suppress(Exception):  # a reply that cannot be sent must not stop the other requests
            self._refuse(reply, "failed", f"integrated_gradients failed: {failure!r:.200}")
        if isinstance(failure, torch.AcceleratorError):  # CUDA cannot recover from it in this process
            threading.Thread(target=self._end_process, daemon=True).start()

    def _refuse(self, reply: Reply, code: str, message: str) -> None:
        self._count_request(reply, code)
        reply.refuse(code, message)

    def _end_process(self) -> None:
        """End after an error of the device: Triton reports the model as not ready, and probes restart the server."""
        pb_utils.Logger.log_error("integrated_gradients ends: its device has failed")
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(1)

    def finalize(self) -> None:
        self.worker.close()
        self.metrics.close()
        if self.breaker is not None:
            self.breaker.remove()

    def _count_chunks(self) -> None:
        """Count the passes since the last call; called in the metrics' thread."""
        new = Counter(dict(self.engine.chunks_passed)) - self.chunks_counted
        self.chunks_counted += new
        for rows, times in new.items():
            self.metrics.count("rows_total", rows * times)
            self.metrics.count("chunks_total", times)
            self.metrics.observe("chunk_fill", rows / self.engine.max_rows, times)
        shared = self.engine.rows_shared - self.shared_counted
        self.shared_counted += shared
        self.metrics.count("rows_total", shared)
        self.metrics.count("shared_rows_total", shared)

    def _count_answer(self, source: str) -> None:
        self.metrics.count("answers_total", source=source)

    def _count_request(self, reply: Reply, outcome: str) -> None:
        self.metrics.count("probes_total" if reply.is_probe else "requests_total", outcome=outcome)

    def _count_explanations(
        self, request: _Request, explanations: list[Explanation], outputs: dict[str, np.ndarray]
    ) -> None:
        """Count an answered request and its explanations. A health check is no explanation that somebody asked for."""
        self._count_request(request.reply, "explained")
        if request.reply.is_probe:
            return
        begun = min(explanation.started for explanation in explanations)
        self.metrics.observe("wait_seconds", max(0.0, begun - request.reply.arrived))
        asked = request.work.parameters
        method = (asked.deadline_ms and "deadline") or (asked.tolerance and "tolerance") or asked.method
        sizes = np.abs(outputs["ATTRIBUTIONS"]).sum(axis=(1, 2, 3))
        gaps = np.abs(outputs["CONVERGENCE_DELTA"][:, 0]) / np.maximum(sizes, 1e-12)
        for explanation, gap in zip(explanations, gaps.tolist()):
            self.metrics.count("explanations_total", method=method)
            self.metrics.observe("steps", explanation.n_steps, method=method)
            self.metrics.observe("convergence_gap", gap, method=method)
            self.metrics.observe("error_estimate", explanation.error_estimate, method=method)
            self.metrics.observe("compute_seconds", explanation.seconds, method=method)


def _why_uncalibrated(files: ClassifierFiles) -> str:
    """Why this process has no calibration of its classifier."""
    try:
        PathDensity.load(files.folder / FILE_NAME, files.sha256)
    except CalibrationError as error:
        return str(error)
    return "this network has been calibrated since the server started; restart the server to use it"


def _why_no_images(files: ClassifierFiles, shape: Sequence[int]) -> str:
    """Why this process has no baseline images of its classifier."""
    try:
        load_images(files.folder / IMAGES_FILE, files.sha256, shape)
    except BaselineError as error:
        return str(error)
    return f"{IMAGES_FILE} has been written since the server started; restart the server to use it"
