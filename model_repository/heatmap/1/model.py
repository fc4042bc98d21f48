"""Triton model: attributions and the pixels they belong to in, PNG overlays out."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from heatmap_drawing import draw_heatmap
from heatmap_parameters import ParameterError, parse_parameters


class TritonPythonModel:
    def initialize(self, args):
        settings = json.loads(args["model_config"])["parameters"]
        self.mean, self.std = (
            np.array(settings[name]["string_value"].split(","), np.float32).reshape(3, 1, 1) for name in ("mean", "std")
        )
        self.foreign_parameters = {name.strip() for name in settings["foreign_parameters"]["string_value"].split(",")}

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        try:
            parameters = parse_parameters(json.loads(request.parameters()), self.foreign_parameters)
        except ParameterError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        pixels, relevance = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("PIXELS", "RELEVANCE")
        )
        images = np.clip(np.round(255 * (pixels * self.std + self.mean)), 0, 255).astype(np.uint8)
        files = [
            draw_heatmap(np.ascontiguousarray(image.transpose(1, 2, 0)), map_, parameters)
            for image, map_ in zip(images, relevance)
        ]
        heatmaps = np.array(files, np.object_)[:, None]
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("HEATMAP", heatmaps)])
