"""What a run leaves in a heatmap's file, so that a later run knows how it was made and can report it again."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from explain_client.protocol import Wanted
from explain_client.results import Explanation, Prediction

KEYWORD = "explain-client"
END_OF_PNG = 12  # bytes of the chunk IEND, which is the last
# A saliency map is kept as means of so many pixels squared: a report smooths it far more.
REDUCTION = 4


@dataclass(frozen=True)
class Record:
    """An explanation of an earlier run and the options that it was made with.

    Its ``saliency`` is reduced by ``REDUCTION``, or None if that run had no report; it has no ``attributions``.
    """

    options: dict[str, Any]
    explanation: Explanation

    def has(self, wanted: Sequence[Wanted]) -> bool:
        """Whether the explanation has the tensors."""
        return "saliency" not in wanted or self.explanation.saliency is not None


def with_record(explanation: Explanation, options: Mapping[str, Any]) -> bytes:
    """The heatmap's PNG file with a text chunk that has the options and the numbers of the explanation.

    Raises:
        ValueError: the explanation has no heatmap.
    """
    if explanation.heatmap_png is None:
        raise ValueError("there is no heatmap")
    error = explanation.error_estimate
    numbers = {
        "convergence_delta": explanation.convergence_delta,
        "n_steps": explanation.n_steps,
        "error_estimate": None if math.isnan(error) else error,
        "milliseconds": explanation.milliseconds,
        "predictions": [asdict(prediction) for prediction in explanation.predictions],
        "explained_class": explanation.explained_class,
        "explained_label": explanation.explained_label,
        "saliency": None if explanation.saliency is None else _reduced(explanation.saliency),
    }
    text = json.dumps({"options": options, "explanation": numbers}).encode()
    # Keyword, no compression, no language, no translated keyword: the PNG specification's iTXt.
    content = b"iTXt" + KEYWORD.encode() + b"\0\0\0\0\0" + text
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    png = explanation.heatmap_png
    return png[:-END_OF_PNG] + chunk + png[-END_OF_PNG:]


def read_record(path: Path) -> Record | None:
    """The record in a heatmap's file; None if it has none that this version can read."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})[KEYWORD]
        record = json.loads(text)
        numbers = record["explanation"]
        numbers["predictions"] = tuple(Prediction(**prediction) for prediction in numbers["predictions"])
        if numbers["error_estimate"] is None:
            numbers["error_estimate"] = math.nan
        numbers["saliency"] = None if numbers["saliency"] is None else _restored(**numbers["saliency"])
        explanation = Explanation(**numbers, attributions=None, heatmap_png=path.read_bytes())
        return Record(dict(record["options"]), explanation)
    except (OSError, SyntaxError, TypeError, ValueError, KeyError):  # no PNG, or of another program or version
        return None


def _reduced(saliency: npt.NDArray[np.float32]) -> dict[str, Any]:
    means = np.asarray(Image.fromarray(saliency).reduce(REDUCTION), "<f4")
    return {"shape": means.shape, "values": base64.b64encode(means.tobytes()).decode("ascii")}


def _restored(shape: Sequence[int], values: str) -> npt.NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(values), "<f4").reshape(shape).astype(np.float32)
