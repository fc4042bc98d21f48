"""Triton model: encoded images in, normalised pixels out."""

import hashlib
import json
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from image_decoding import ImageLimits, load_pixels, open_image
from image_structure import ImageError
from overload_reading import OverloadedError, check_overload
from PIL import Image

# That it goes on within a batch, which may take long, is seen from the first.
COUNTERS = {
    "images_total": "Images looked into or decoded",
    "overloaded_total": "Requests turned away because the gradients take no more",
}


class TritonPythonModel:
    def initialize(self, args):
        # Pillow's remarks on strangers' files: every new text would be logged, and remembered for good.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        parameters = json.loads(args["model_config"])["parameters"]
        settings = {name: value["string_value"] for name, value in parameters.items()}
        # The classifier's own, as `tools/export` wrote it beside it; of a file from elsewhere, the settings.
        folder = Path(args["model_repository"]).parent / "classifier" / args["model_version"]
        own = {}
        if (folder / "manifest.json").is_file() and (folder / "model.pt").is_file():
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["model_sha256"] == hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest():
                own = manifest["preprocessing"]
        self.mean, self.std = (
            own.get(name) or [float(v) for v in settings[name].split(",")] for name in ("mean", "std")
        )
        limits = ("max_image_bytes", "max_image_pixels", "max_request_pixels")
        self.limits = ImageLimits(*(int(settings[name]) for name in limits))
        labels = {"instance": args["model_instance_name"], "pid": str(os.getpid())}
        self.families, self.metrics = {}, {}
        for name, description in COUNTERS.items():
            try:
                self.families[name] = pb_utils.MetricFamily(
                    name=f"preprocess_{name}", description=description, kind=pb_utils.MetricFamily.COUNTER
                )
                own = {**labels, "outcome": "overloaded"} if name == "overloaded_total" else labels
                self.metrics[name] = self.families[name].Metric(labels=own)
            except pb_utils.TritonModelException as error:
                pb_utils.Logger.log_warn(f"no metric preprocess_{name}: {error}")

    def finalize(self):
        self.metrics.clear()  # before their families, which they must not outlive
        self.families.clear()

    def _count(self, name: str) -> None:
        if name in self.metrics:
            self.metrics[name].increment(1)

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        try:
            pixels, target = self._preprocess(request)
        except ImageError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except OverloadedError as error:
            self._count("overloaded_total")
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.UNAVAILABLE))
        except Exception as failure:  # left to Triton, it would fail the whole batch
            pb_utils.Logger.log_error(f"preprocess failed: {traceback.format_exc()}")
            error = pb_utils.TritonError(f"preprocess failed: {failure!r:.200}", pb_utils.TritonError.INTERNAL)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor("PIXELS", pixels), pb_utils.Tensor("RESOLVED_TARGET", target)]
        )

    def _preprocess(self, request) -> tuple[np.ndarray, np.ndarray]:
        """Pixels float32 [n, 3, 224, 224] and targets int64 [n, 1] of a request."""
        files = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy()
        target = pb_utils.get_input_tensor_by_name(request, "TARGET")
        if files.ndim != 2:  # of a batch of none, Triton 2.51 makes a single one without its batch dimension
            raise ImageError("IMAGE must be at least one")
        # Only a request that goes on to the gradients needs its target.
        if "RESOLVED_TARGET" in request.requested_output_names():
            check_overload(os.getppid(), json.loads(request.parameters()))
        target = np.full((len(files), 1), -1, np.int64) if target is None else target.as_numpy()
        images = self._for_each(lambda file: open_image(file, self.limits), files[:, 0])
        pixels = sum(image.width * image.height for image in images)
        if pixels > self.limits.max_request_pixels:
            most = self.limits.max_request_pixels
            raise ImageError(f"IMAGE has {pixels} pixels in {len(images)} images; at most {most} are allowed")
        return np.stack(self._for_each(self._load, images)), target

    def _load(self, image: Image.Image) -> np.ndarray:
        return load_pixels(image, self.mean, self.std, self.limits).numpy()

    def _for_each(self, function: Callable, values: Sequence) -> list:
        """``function`` of each value; what it refuses is numbered."""
        results = []
        for index, value in enumerate(values):
            self._count("images_total")
            try:
                results.append(function(value))
            except ImageError as error:
                where = f" (image {index} of {len(values)})" if len(values) > 1 else ""
                raise ImageError(f"{error}{where}") from None
        return results
