"""One self-contained HTML page for a run: images, predictions and heatmaps are embedded."""

from __future__ import annotations

import base64
import io
import math
import shutil
from html import escape
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType

from explain_client.images import DEFAULT_VIEW, View, as_seen
from explain_client.results import Explanation

_PLACE = "<!-- items -->"
JPEG_QUALITY = 85


class Report:
    """A page under way, as a context manager. Items are written to a temporary file, which becomes the page at the end.

    Args:
        path: file of the page; an existing one is replaced when the page is complete.
        view: of the server's classifier, to show images as it sees them.

    Raises:
        OSError: the page cannot be written.
    """

    def __init__(self, path: Path, view: View = DEFAULT_VIEW) -> None:
        self._path, self._view = path, view
        self._count = 0

    def __enter__(self) -> Report:
        template = files("explain_client").joinpath("report.html").read_text("utf-8")
        before, self._after = template.split(_PLACE)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = NamedTemporaryFile(
            "w", encoding="utf-8", dir=self._path.parent, prefix=f".{self._path.name}.", delete=False
        )
        self._file.write(before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.write(self._after)
        Path(self._file.name).chmod(0o644)
        shutil.move(self._file.name, self._path)

    def add(self, name: str, file: bytes, explanation: Explanation) -> None:
        """Add an image by its encoded bytes and its explanation, which must have the heatmap."""
        top = explanation.predictions[0]
        error = "" if math.isnan(explanation.error_estimate) else f"{explanation.error_estimate:.4f}"
        facts = [
            f"evidence for <b>{escape(explanation.explained_label)}</b>",
            f"{explanation.n_steps} steps",
            f"estimated error {100 * explanation.error_estimate:.1f} %" if error else "no error estimate",
            f"{explanation.milliseconds:.0f} ms",
        ]
        seen = io.BytesIO()
        as_seen(file, self._view).save(seen, "JPEG", quality=JPEG_QUALITY)
        self._write(
            name,
            f'data-probability="{top.probability:.6f}" data-error="{error}" data-steps="{explanation.n_steps}" '
            f'data-milliseconds="{explanation.milliseconds:.1f}"',
            '<div class="view">'
            f'<img alt="the image" src="{_data_url("image/jpeg", seen.getvalue())}">'
            f'<img alt="its heatmap" class="over" src="{_data_url("image/png", explanation.heatmap_png or b"")}"></div>'
            f'<input type="range" min="0" max="100" value="50" aria-label="image to heatmap, {escape(name)}">'
            f'<div class="predictions">{"".join(_bars(explanation))}</div><p class="facts">{" · ".join(facts)}</p>',
        )

    def add_failure(self, name: str, message: str) -> None:
        """Add an image that was not explained, and the reason."""
        self._write(name, 'data-failed="1"', f'<p class="failure">{escape(message)}</p>')

    def _write(self, name: str, data: str, content: str) -> None:
        attributes = f'data-number="{self._count}" data-name="{escape(name)}" {data}'
        self._file.write(f"<article {attributes}><h2>{escape(name)}</h2>{content}</article>\n")
        self._count += 1


def _bars(explanation: Explanation) -> list[str]:
    explained = explanation.explained_class
    return [
        f'<span class="label{" explained" if prediction.index == explained else ""}">{escape(prediction.label)}</span>'
        f'<span class="track"><i style="width:{100 * prediction.probability:.1f}%"></i></span>'
        f'<span class="number">{100 * prediction.probability:.1f} %</span>'
        for prediction in explanation.predictions
    ]


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
