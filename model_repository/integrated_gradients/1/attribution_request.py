"""One request to ``integrated_gradients``: read and validate it, turn it into jobs, answer it."""

from __future__ import annotations  # pb_utils has its types only inside Triton

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from attribution_job import Explanation, Job
from attribution_parameters import AttributionParameters, Limits, parse_parameters
from error_codes import triton_error
from path_baselines import Baselines
from probe_requests import is_probe
from request_parameters import ParameterError
from torch import Tensor

# Normalised pixels lie within about 3. Numbers so large that they overflow would spoil the other rows of their pass.
LARGEST_PIXEL = 1e4
# Least interval between two questions to Triton whether a request has been cancelled.
CANCELLATION_SECONDS = 0.05


class TensorError(ValueError):
    """A tensor of a request has values that cannot be explained; the message names it."""


@dataclass(frozen=True, eq=False)
class Work:
    """One valid request.

    Attributes:
        pixels: float32 [n, channels, height, width].
        logits: float32 [n, classes].
        targets: explained classes, resolved.
        parameters: the request's.
        digests: SHA-256 of each image's pixels.
    """

    pixels: Tensor
    logits: Tensor
    targets: list[int]
    parameters: AttributionParameters
    digests: list[bytes]


@dataclass(frozen=True)
class RequestReader:
    """Reads requests for one network.

    Attributes:
        device: of the engine.
        model_sha256: of the classifier's file.
        classes: of the network.
        limits: of the server.
        foreign_parameters: names that belong to other steps of the ensemble.
        baselines: of the network.
        why_no_images: tells why there are no images among the baselines; None if there are.
        why_uncalibrated: tells why the method ``calibrated`` is refused; None if it is allowed.
    """

    device: torch.device
    model_sha256: str
    classes: int
    limits: Limits
    foreign_parameters: Set[str]
    baselines: Baselines
    why_no_images: Callable[[], str] | None
    why_uncalibrated: Callable[[], str] | None

    def read(self, request: Any) -> Work:
        """Read and validate a request of Triton's.

        Raises:
            ParameterError, TensorError: the request is not valid.
        """
        parameters = parse_parameters(json.loads(request.parameters()), self.limits, self.foreign_parameters)
        if parameters.method == "calibrated" and self.why_uncalibrated is not None:
            raise ParameterError(f"parameter 'method' must not be 'calibrated': {self.why_uncalibrated()}")
        if "images" in parameters.baselines and self.why_no_images is not None:
            raise ParameterError(f"parameter 'baseline' must not be 'images': {self.why_no_images()}")
        pixels, logits = (
            # A copy: Triton takes its shared memory back when `execute` returns.
            torch.tensor(pb_utils.get_input_tensor_by_name(request, name).as_numpy())
            for name in ("PIXELS", "LOGITS")
        )
        self._check_tensors(pixels, logits)
        parameters.check_cost(len(pixels), self.baselines.count(parameters.baselines), self.limits)
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
        digests = [hashlib.sha256(image.numpy()).digest() for image in pixels]
        return Work(pixels.to(self.device), logits.to(self.device), targets, parameters, digests)

    def _check_tensors(self, pixels: Tensor, logits: Tensor) -> None:
        if pixels.dim() != 4 or logits.dim() != 2:  # Triton 2.51 drops the batch dimension of an empty batch
            raise TensorError("PIXELS and LOGITS must be at least one")
        if logits.shape[1] != self.classes:
            raise TensorError(f"LOGITS must be of the classifier's {self.classes} classes, not {logits.shape[1]}")
        for name, values in (("PIXELS", pixels), ("LOGITS", logits)):
            if not values.isfinite().all():
                raise TensorError(f"{name} must be finite")
        largest = pixels.abs().max().item()
        if largest > LARGEST_PIXEL:
            raise TensorError(f"PIXELS must be from {-LARGEST_PIXEL:g} to {LARGEST_PIXEL:g}, not up to {largest:g}")

    def jobs(self, work: Work, reply: Reply) -> list[Job]:
        """One job for each image."""
        asked = work.parameters
        deadline = None if asked.deadline_ms is None else reply.arrived + asked.deadline_ms / 1000
        seed = asked.seed if "noise" in asked.baselines else None
        jobs = []
        for image, logits, target, digest in zip(work.pixels, work.logits, work.targets, work.digests):
            (baseline, key), *further = self.baselines.starts(asked.baselines, image, asked.seed)
            job = Job(
                image=image,
                baseline=baseline,
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
                baseline_key=key,
                # A health check is to find out whether gradients can be taken.
                ends_key=None if reply.is_probe else (self.model_sha256, digest, asked.baselines, seed),
                is_cancelled=reply.is_unwanted,
                further_baselines=further,
            )
            jobs.append(job)
        return jobs


class Reply:
    """Answers one request, once.

    Args:
        request: Triton's.
        arrived: by ``time.monotonic``.
    """

    def __init__(self, request: Any, arrived: float) -> None:
        self._sender = request.get_response_sender()
        self._wanted = set(request.requested_output_names())
        self.arrived = arrived
        self.is_probe = is_probe(request)
        self.timeout_seconds = request.timeout() / 1e6 or math.inf
        self.is_sent = threading.Event()
        self._is_cancelled, self._checked = False, 0.0

    def is_late(self) -> bool:
        """Whether the request's timeout is over."""
        return time.monotonic() >= self.arrived + self.timeout_seconds

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled it, as of at most ``CANCELLATION_SECONDS`` ago."""
        if not self._is_cancelled and time.monotonic() >= self._checked + CANCELLATION_SECONDS:
            self._is_cancelled, self._checked = self._sender.is_cancelled(), time.monotonic()
        return self._is_cancelled

    def is_unwanted(self) -> bool:
        """Whether the client no longer waits for it."""
        return not self.is_sent.is_set() and (self.is_late() or self.is_cancelled())

    def send(self, outputs: dict[str, np.ndarray]) -> None:
        """Answer with the requested ones of ``outputs``."""
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in self._wanted]
        self._send(pb_utils.InferenceResponse(output_tensors=tensors))

    def refuse(self, code: str, message: str) -> None:
        """Answer with an error: ``code`` is one of ``error_codes``."""
        self._send(pb_utils.InferenceResponse(error=triton_error(code, message)))

    def _send(self, response: pb_utils.InferenceResponse) -> None:
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.is_sent.set()


def response_outputs(work: Work, explanations: list[Explanation]) -> dict[str, np.ndarray]:
    """The output tensors of a request, from the explanations of all its images.

    Raises:
        ArithmeticError: the gradients are not finite.
    """
    attributions = torch.stack([explanation.attributions for explanation in explanations]).cpu().numpy()
    if not np.isfinite(attributions).all():
        raise ArithmeticError("the gradients are not finite")
    saliency = attributions.sum(axis=1)
    deltas = torch.stack([e.convergence_delta for e in explanations if e.convergence_delta is not None])
    return {
        "EXPLAINED_CLASS": np.array(work.targets, np.int64)[:, None],
        "ATTRIBUTIONS": attributions,
        "SALIENCY": saliency,
        "CONVERGENCE_DELTA": deltas.cpu().numpy()[:, None],
        "N_STEPS": np.array([[explanation.n_steps] for explanation in explanations], np.int32),
        "ERROR_ESTIMATE": np.array([[explanation.error_estimate] for explanation in explanations], np.float32),
        "WEIGHT_SUM": np.array([[explanation.weight_sum] for explanation in explanations], np.float32),
        "RELEVANCE": saliency,
    }
