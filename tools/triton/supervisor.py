"""Keeps a server running: probes it with real requests, and restarts it when it ends, fails or hangs.

Triton stays "ready" when a model's process dies (fixed in 26.01), and does not notice one that hangs.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tools.probe import ProbeError, probe_patiently
from tools.triton.process import ServerError, TritonProcess


@dataclass(frozen=True)
class Watch:
    """Times of probes and restarts, in seconds.

    One image may take 4 s to decode, so two probes in a row must fail. If one pass of the gradients can exceed
    ``probe_seconds``, healthy servers are restarted.
    """

    interval: float = 2.0
    probe_seconds: float = 4.0
    # Time for other requests to finish before a restart.
    grace: float = 2.0
    # Pauses double from the first to the longest until the server answers. More than `most_restarts` within `window`
    # end the supervision.
    first_pause: float = 1.0
    longest_pause: float = 30.0
    most_restarts: int = 6
    window: float = 600.0
    # The model to probe: `explain`, or `classify` if nothing else is served.
    model: str = "explain"


def stop_on_signals() -> None:
    """Make SIGTERM and SIGINT raise ``KeyboardInterrupt`` once: a second signal must not interrupt the orderly stop."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)


def supervise(server: TritonProcess, watch: Watch = Watch(), say: Callable[[str], None] = lambda message: None) -> None:
    """Watch a running server and restart it; never returns.

    Args:
        server: a started server.
        watch: times of probes and restarts.
        say: called with a message about each restart.

    Raises:
        ServerError: it was restarted too often.
    """
    restarts: deque[float] = deque()
    pause = watch.first_pause
    while True:
        reason, was_healthy = trouble(server, watch)
        server.stop(watch.grace)
        if was_healthy:
            pause = watch.first_pause
        while True:
            now = time.monotonic()
            restarts.append(now)
            while restarts[0] < now - watch.window:
                restarts.popleft()
            if len(restarts) > watch.most_restarts:
                raise ServerError(
                    f"gave up after {watch.most_restarts} restarts within {watch.window:g} s; the last time: {reason}"
                )
            say(f"{reason}; restart {len(restarts)} of at most {watch.most_restarts} in {pause:g} s")
            time.sleep(pause)
            pause = min(2 * pause, watch.longest_pause)
            try:
                server.start()
                say("ready again")
                break
            except ServerError as failure:
                reason = str(failure)


def trouble(server: TritonProcess, watch: Watch) -> tuple[str, bool]:
    """Wait until a server ends or fails its probes; returns the reason, and whether any probe had passed."""
    failures, was_healthy = 0, False
    while True:
        try:
            code = server.process.wait(1.0 if failures else watch.interval)
            return f"Triton ended with code {code}", was_healthy
        except subprocess.TimeoutExpired:
            pass
        try:
            probe_patiently(
                server.host, server.ports.http, server.ports.metrics, watch.model, seconds=watch.probe_seconds
            )
            failures, was_healthy = 0, True
        except ProbeError as failure:
            failures += 1
            if failures == 2 and server.process.poll() is None:
                return str(failure), was_healthy
