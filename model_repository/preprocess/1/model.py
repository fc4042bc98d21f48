"""Triton model: encoded images in, normalised pixels out."""

from __future__ import annotations  # pb_utils has its types only inside Triton

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

# The modules that all models share.
sys.path.append(str(Path(__file__).resolve().parents[2] / "integrated_gradients" / "1"))

from attribution_parameters import read_parameters
from circuit_breaker import CircuitOpenError, check_circuit
from cpu_quota import threads
from error_codes import triton_error
from image_decoding import ImageLimits, load_pixels, open_image
from image_structure import ImageError
from load_errors import refusing_to_load
from metric_families import metric_family
from model_setup import ModelSetup
from PIL import Image
from probe_requests import is_probe

# Name -> description, and the labels of each series.
COUNTERS: dict[str, tuple[str, tuple[dict[str, str], ...]]] = {
    # It also shows progress within a batch, which may take long.
    "images_total": ("Images looked into or decoded, health checks' too", ({},)),
    "overloaded_total": (
        "Requests turned away because the gradients take no more, health checks apart",
        ({"outcome": "overloaded"},),
    ),
    "probes_total": ("Requests of health checks by model", ({"model": "explain"}, {"model": "classify"})),
}


class TritonPythonModel:
    @refusing_to_load()
    def initialize(self, args: dict[str, str]) -> None:
        # Pillow's warnings about strangers' files: each new text would be logged and kept in memory.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        torch.set_num_threads(threads())
        setup = ModelSetup.read(args)
        self.preprocessing = setup.preprocessing
        self.network = json.dumps(setup.files.network).encode()
        limits = ("max_image_bytes", "max_image_pixels", "max_request_pixels")
        self.limits = ImageLimits(*(int(setup.settings[name]) for name in limits))
        labels = {"instance": args["model_instance_name"], "pid": str(os.getpid())}
        self.families: list[Any] = []  # a family must outlive its metrics
        self.metrics: dict[tuple[str, ...], Any] = {}
        for name, (description, series) in COUNTERS.items():
            family = metric_family(f"preprocess_{name}", description)
            if family is not None:
                self.families.append(family)
                for own in series:
                    key = (name, *own.values())
                    self.metrics[key] = family.Metric(labels={**labels, **own})

        pb_utils.Logger.log_info(f"preprocess: threads {torch.get_num_threads()}")

    def finalize(self) -> None:
        self.metrics.clear()  # first: a metric must not outlive its family
        self.families.clear()

    def _count(self, *series: str) -> None:
        """Count in a series: its name in ``COUNTERS`` and the values of its labels."""
        if series in self.metrics:
            self.metrics[series].increment(1)

    def execute(self, requests: list[Any]) -> list[pb_utils.InferenceResponse]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> pb_utils.InferenceResponse:
        try:
            pixels, target = self._preprocess(request)
        except ImageError as error:
            return pb_utils.InferenceResponse(error=triton_error("invalid", str(error)))
        except CircuitOpenError as error:
            if not is_probe(request):
                self._count("overloaded_total", "overloaded")
            return pb_utils.InferenceResponse(error=triton_error("overloaded", str(error)))
        except Exception as failure:  # an exception would make Triton fail the whole batch
            pb_utils.Logger.log_error(f"preprocess failed: {traceback.format_exc()}")
            return pb_utils.InferenceResponse(error=triton_error("failed", f"preprocess failed: {failure!r:.200}"))
        tensors = [pb_utils.Tensor("PIXELS", pixels), pb_utils.Tensor("RESOLVED_TARGET", target)]
        if "NETWORK" in request.requested_output_names():
            tensors.append(pb_utils.Tensor("NETWORK", np.full((len(pixels), 1), self.network, np.object_)))
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _preprocess(self, request: Any) -> tuple[np.ndarray, np.ndarray]:
        """Pixels float32 [n, channels, height, width] and targets int64 [n, 1] of a request."""
        files = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy()
        target = pb_utils.get_input_tensor_by_name(request, "TARGET")
        if files.ndim != 2:  # Triton 2.51 drops the batch dimension of an empty batch
            raise ImageError("IMAGE must be at least one")
        is_of_explain = "RESOLVED_TARGET" in request.requested_output_names()
        if is_probe(request):
            self._count("probes_total", "explain" if is_of_explain else "classify")
        if is_of_explain:
            parameters = read_parameters(json.loads(request.parameters()))
            # Triton tells no step which of the ensemble's outputs are requested: it may be the probabilities alone.
            if parameters is not None and (target is not None or parameters.model_fields_set):
                check_circuit(os.getppid(), parameters)
        target = np.full((len(files), 1), -1, np.int64) if target is None else target.as_numpy()
        images = self._for_each(lambda file: open_image(file, self.preprocessing, self.limits), files[:, 0])
        pixels = sum(image.width * image.height for image in images)
        if pixels > self.limits.max_request_pixels:
            most = self.limits.max_request_pixels
            raise ImageError(f"IMAGE has {pixels} pixels in {len(images)} images; at most {most} are allowed")
        return np.stack(self._for_each(self._load, images)), target

    def _load(self, image: Image.Image) -> np.ndarray:
        return load_pixels(image, self.preprocessing, self.limits).numpy()

    def _for_each(self, function: Callable, values: Sequence) -> list:
        """``function`` of each value; an ``ImageError`` gets the image's number."""
        results = []
        for index, value in enumerate(values):
            self._count("images_total")
            try:
                results.append(function(value))
            except ImageError as error:
                where = f" (image {index} of {len(values)})" if len(values) > 1 else ""
                raise ImageError(f"{error}{where}") from None
        return results
