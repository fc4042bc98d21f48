"""Triton model: attributions and the pixels they belong to in, PNG overlays out."""

import hashlib
import json
import traceback
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from heatmap_drawing import draw_heatmap
from heatmap_parameters import ParameterError, parse_parameters


class TensorError(ValueError):
    """A tensor holds what cannot be drawn; the message names it."""


class TritonPythonModel:
    def initialize(self, args):
        settings = json.loads(args["model_config"])["parameters"]
        # The classifier's own, as `tools/export` wrote it beside it; of a file from elsewhere, the settings.
        folder = Path(args["model_repository"]).parent / "classifier" / args["model_version"]
        own = {}
        if (folder / "manifest.json").is_file() and (folder / "model.pt").is_file():
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["model_sha256"] == hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest():
                own = manifest["preprocessing"]
        self.mean, self.std = (
            np.array(own.get(name) or settings[name]["string_value"].split(","), np.float32).reshape(3, 1, 1)
            for name in ("mean", "std")
        )
        self.foreign_parameters = {name.strip() for name in settings["foreign_parameters"]["string_value"].split(",")}

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        try:
            heatmaps = self._draw(request)
        except (ParameterError, TensorError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as failure:  # left to Triton, it would fail the whole batch
            pb_utils.Logger.log_error(f"heatmap failed: {traceback.format_exc()}")
            error = pb_utils.TritonError(f"heatmap failed: {failure!r:.200}", pb_utils.TritonError.INTERNAL)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("HEATMAP", heatmaps)])

    def _draw(self, request) -> np.ndarray:
        """PNG files [n, 1] of a request."""
        parameters = parse_parameters(json.loads(request.parameters()), self.foreign_parameters)
        pixels, relevance = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("PIXELS", "RELEVANCE")
        )
        if pixels.ndim != 4 or relevance.ndim != 3:  # what Triton 2.51 makes of a batch of none
            raise TensorError("PIXELS and RELEVANCE must be at least one")
        for name, values in (("PIXELS", pixels), ("RELEVANCE", relevance)):
            if not np.isfinite(values).all():
                raise TensorError(f"{name} must be finite")
        images = np.clip(np.round(255 * (pixels * self.std + self.mean)), 0, 255).astype(np.uint8)
        files = [
            draw_heatmap(np.ascontiguousarray(image.transpose(1, 2, 0)), map_, parameters)
            for image, map_ in zip(images, relevance)
        ]
        return np.array(files, np.object_)[:, None]
