"""Triton model: encoded images in, normalised pixels out."""

import json
import traceback
import warnings

import numpy as np
import triton_python_backend_utils as pb_utils
from image_decoding import ImageError, ImageLimits, load_pixels


class TritonPythonModel:
    def initialize(self, args):
        # Pillow's remarks on strangers' files: every new text would be logged, and remembered for good.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        parameters = json.loads(args["model_config"])["parameters"]
        settings = {name: value["string_value"] for name, value in parameters.items()}
        self.mean, self.std = ([float(value) for value in settings[name].split(",")] for name in ("mean", "std"))
        self.limits = ImageLimits(int(settings["max_image_bytes"]), int(settings["max_image_pixels"]))

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        try:
            pixels, target = self._preprocess(request)
        except ImageError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as failure:  # left to Triton, it would fail the whole batch
            pb_utils.Logger.log_error(f"preprocess failed: {traceback.format_exc()}")
            error = pb_utils.TritonError(f"preprocess failed: {failure!r:.200}", pb_utils.TritonError.INTERNAL)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor("PIXELS", pixels), pb_utils.Tensor("RESOLVED_TARGET", target)]
        )

    def _preprocess(self, request) -> tuple[np.ndarray, np.ndarray]:
        """Pixels float32 [n, 3, 224, 224] and targets int64 [n, 1] of a request."""
        files = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy()[:, 0]
        target = pb_utils.get_input_tensor_by_name(request, "TARGET")
        target = np.full((len(files), 1), -1, np.int64) if target is None else target.as_numpy()
        pixels = []
        for index, encoded in enumerate(files):
            try:
                pixels.append(load_pixels(encoded, self.mean, self.std, self.limits))
            except ImageError as error:
                where = f" (image {index} of {len(files)})" if len(files) > 1 else ""
                raise ImageError(f"{error}{where}") from None
        return np.stack(pixels), target
