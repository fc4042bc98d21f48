"""``explain web``: a live page on this machine, which explains pictures through any server that the client can reach.

Needs the extra ``web``: ``pip install 'explain-client[web]'``.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from explain_client import captions, cards
from explain_client.client import ExplainClient
from explain_client.errors import ExplainError
from explain_client.live import OVERLAYS, Question, Session, Style
from explain_client.options import UsageError, add_server_options, connection_options, parse, refusing_usage
from explain_client.parameters import Polarity
from explain_client.results import Network

LOOPBACK, DEFAULT_PORT = "127.0.0.1", 7860
TOLERANCES = {"±10 %": 0.1, "±5 %": 0.05, "±2 %": 0.02, "±1 %": 0.01}
MOST_SESSIONS = 100  # each keeps two pictures
ANY = -1  # of a choice of classes: the predicted one, or none


def main(words: Sequence[str]) -> int:
    """The subcommand: serve the page until it is interrupted; returns the exit status.

    Raises:
        UsageError: Gradio is missing, or the port is taken.
        ExplainError: the server cannot be used.
    """
    parser = argparse.ArgumentParser(prog="explain web", description="Explain pictures on a page in the browser.")
    add_server_options(parser)
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="of the page, on loopback; 0: a free one (default: %(default)s)"
    )
    options = parse(parser, words)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the page needs Gradio ({error}): pip install 'explain-client[web]'") from None
    with refusing_usage():
        client = ExplainClient(**connection_options(options))
    with client:
        page = Page(client)
        try:
            listening = socket.create_server((LOOPBACK, options.port))
        except OSError as error:
            raise UsageError(f"port {options.port} is not free ({error.strerror}): choose one with --port") from None
        with listening:
            print(f"explanations on http://{LOOPBACK}:{listening.getsockname()[1]}/ (Ctrl-C stops it)", flush=True)
            server_of(page.app()).run(sockets=[listening])
    return 0


def server_of(app: Any) -> Any:
    """A uvicorn server of the page, not yet running. When it ends it does not wait for pages that are open."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


class Page:
    """The page: controls, and a session for each visitor.

    Raises:
        ExplainError: the server cannot be used.
    """

    def __init__(self, client: ExplainClient) -> None:
        self._client = client
        self._view = client.view()
        self._labels = client.labels()
        try:
            self._network: Network | None = client.network()
        except ExplainError:  # a server of another version of the model repository
            self._network = None
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def app(self) -> Any:
        """The page as an ASGI application, with the visitors' reports at ``/report/KEY``."""
        import gradio
        from fastapi import FastAPI, HTTPException
        from fastapi.responses import HTMLResponse

        app = FastAPI()

        @app.get("/report/{key}", response_class=HTMLResponse)
        def report(key: str, polarity: Polarity = "all") -> Any:
            session = self._sessions.get(key)
            if session is None:
                raise HTTPException(404, "this page was closed long ago")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "report.html"
                session.write_report(path, Style(polarity))
                return path.read_text("utf-8")

        css = f":root {{ {cards.style('all')} }}\n{cards.stylesheet()}\n{_resource('web.css')}"
        theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        return gradio.mount_gradio_app(app, self._blocks(), "/", css=css, theme=theme, footer_links=[], ssr_mode=False)

    def _session(self, key: str) -> Session:
        """The session of a visitor, a new one if it is not known (any more)."""
        if key not in self._sessions:
            self._sessions[key] = Session(self._client, self._view, self._network, self._labels)
            while len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def _blocks(self) -> Any:
        import gradio as gr

        classes = [(f"{label} ({index})", index) for index, label in enumerate(self._labels)]
        with gr.Blocks(title="Explanations") as blocks:
            key = gr.State(lambda: secrets.token_urlsafe(16))
            gr.Markdown(_resource("web.md"))
            with gr.Row():
                tolerance = gr.Dropdown(
                    list(TOLERANCES), value="±5 %", label="explanation accurate to about", min_width=220
                )
                polarity = gr.Dropdown(
                    [(words, name) for name, words in captions.POLARITIES.items()],
                    value="all",
                    label="colours show",
                    min_width=220,
                )
                overlay = gr.Dropdown(
                    [(words, name) for name, words in OVERLAYS.items()],
                    value="photograph",
                    label="colours lie",
                    min_width=220,
                )
            link = gr.HTML()
            images: list[Any] = []
            targets: list[Any] = []
            contrasts: list[Any] = []
            panels: list[Any] = []
            with gr.Row():
                for which in ("first", "second"):
                    with gr.Column(min_width=320):
                        images.append(
                            gr.Image(
                                label=f"{which} picture: drop, paste, choose or take one",
                                type="filepath",
                                image_mode=None,
                                sources=["upload", "clipboard", "webcam"],
                                height=220,
                                elem_id=f"{which}-image",
                            )
                        )
                        with gr.Row():
                            for chosen, label, nothing in (
                                (targets, "why", "the predicted class"),
                                (contrasts, "rather than", "(nothing)"),
                            ):
                                choices = [(nothing, ANY), *classes]
                                chosen.append(gr.Dropdown(choices, value=ANY, label=label, min_width=220))
                        panels.append(gr.HTML(elem_id=f"{which}-panel"))
            style = [polarity, overlay]
            for number in (0, 1):
                gr.on(
                    [each.change for each in (images[number], targets[number], contrasts[number], tolerance)],
                    self._explaining(number),
                    [key, images[number], targets[number], contrasts[number], tolerance, *style],
                    [*panels, link],
                    show_progress="hidden",
                    concurrency_limit=4,
                )
            gr.on([each.change for each in style], self._redraw, [key, *style], [*panels, link], show_progress="hidden")
        return blocks

    def _explaining(self, number: int) -> Any:
        """The event handler of one panel: yields both panels, for they share one scale of colours, and the link."""

        def explain(
            key: str,
            image: str | None,
            target: int,
            contrast: int,
            tolerance: str,
            polarity: Polarity,
            overlay: Any,
        ) -> Iterator[list[str]]:
            session = self._session(key)
            question = Question(_class(target), _class(contrast), TOLERANCES[tolerance])
            file, name = (Path(image).read_bytes(), Path(image).name) if image else (b"", "")
            for _ in session.explain(number, file, name, question):
                yield self._redraw(key, polarity, overlay)

        return explain

    def _redraw(self, key: str, polarity: Polarity, overlay: Any) -> list[str]:
        """Both panels and the link to the report, from what is known: no request is made."""
        session = self._session(key)
        link = ""
        if any(panel.level is not None for panel in session.panels):
            link = (
                f'<a href="/report/{key}?polarity={polarity}" target="_blank" id="report">Report of these pictures</a>'
            )
        return [*(session.html(number, Style(polarity, overlay)) for number in (0, 1)), link]


def _class(choice: int) -> int | None:
    return None if choice == ANY else choice


def _resource(name: str) -> str:
    return files("explain_client").joinpath(name).read_text("utf-8")
