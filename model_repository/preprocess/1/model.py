"""Triton model: encoded images in, normalised pixels out."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from image_decoding import ImageError, load_pixels


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.mean, self.std = (
            [float(value) for value in parameters[name]["string_value"].split(",")] for name in ("mean", "std")
        )

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        files = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy()[:, 0]
        target = pb_utils.get_input_tensor_by_name(request, "TARGET")
        target = np.full((len(files), 1), -1, np.int64) if target is None else target.as_numpy()
        pixels = []
        for index, encoded in enumerate(files):
            try:
                pixels.append(load_pixels(encoded, self.mean, self.std))
            except ImageError as error:
                where = f" (image {index} of {len(files)})" if len(files) > 1 else ""
                message = f"{error}{where}"
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("PIXELS", np.stack(pixels)),
                pb_utils.Tensor("RESOLVED_TARGET", target),
            ]
        )
