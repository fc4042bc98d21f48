"""What a run leaves in a heatmap's file, so that a later run knows how it was made and can report it again."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from explain_client.results import Explanation, Prediction

KEYWORD = "explain-client"
END_OF_PNG = 12  # bytes of the chunk IEND, which is the last


@dataclass(frozen=True)
class Record:
    """An explanation of an earlier run, without its tensors, and the options that it was made with."""

    options: dict[str, Any]
    explanation: Explanation


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
        explanation = Explanation(**numbers, saliency=None, attributions=None, heatmap_png=path.read_bytes())
        return Record(dict(record["options"]), explanation)
    except (OSError, SyntaxError, TypeError, ValueError, KeyError):  # no PNG, or of another program or version
        return None
