"""Triton model: attributions and their pixels in, PNG overlays out."""

from __future__ import annotations  # pb_utils has its types only inside Triton

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# The modules that all models share.
sys.path.append(str(Path(__file__).resolve().parents[2] / "integrated_gradients" / "1"))

from error_codes import triton_error
from heatmap_drawing import draw_heatmap, pictures
from heatmap_parameters import parse_parameters
from load_errors import refusing_to_load
from model_setup import ModelSetup
from request_parameters import ParameterError


class TensorError(ValueError):
    """A tensor has values that cannot be drawn; the message names it."""


class TritonPythonModel:
    @refusing_to_load()
    def initialize(self, args: dict[str, str]) -> None:
        setup = ModelSetup.read(args)
        self.preprocessing = setup.preprocessing
        self.max_region_pixels = int(setup.settings["max_region_pixels"])
        self.foreign_parameters = {name.strip() for name in setup.settings["foreign_parameters"].split(",")}

    def execute(self, requests: list[Any]) -> list[pb_utils.InferenceResponse]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> pb_utils.InferenceResponse:
        try:
            heatmaps = self._draw(request)
        except (ParameterError, TensorError) as error:
            return pb_utils.InferenceResponse(error=triton_error("invalid", str(error)))
        except Exception as failure:  # an exception would make Triton fail the whole batch
            pb_utils.Logger.log_error(f"heatmap failed: {traceback.format_exc()}")
            return pb_utils.InferenceResponse(error=triton_error("failed", f"heatmap failed: {failure!r:.200}"))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("HEATMAP", heatmaps)])

    def _draw(self, request: Any) -> np.ndarray:
        """PNG files [n, 1] of a request."""
        parameters = parse_parameters(json.loads(request.parameters()), self.foreign_parameters)
        pixels, relevance = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("PIXELS", "RELEVANCE")
        )
        if pixels.ndim != 4 or relevance.ndim != 3:  # Triton 2.51 drops the batch dimension of an empty batch
            raise TensorError("PIXELS and RELEVANCE must be at least one")
        for name, values in (("PIXELS", pixels), ("RELEVANCE", relevance)):
            if not np.isfinite(values).all():
                raise TensorError(f"{name} must be finite")
        images = pictures(pixels, self.preprocessing)
        files = [
            draw_heatmap(image, map_, parameters, self.max_region_pixels) for image, map_ in zip(images, relevance)
        ]
        return np.array(files, np.object_)[:, None]
