"""Keeps a server answering: probes it with real requests, and starts it anew when it ended, failed or hangs.

Triton 2.51 stays "ready" when a model's process dies (until 26.01), and nothing in it notices one that hangs.
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
    """How closely to look, in seconds.

    One image may take 4 s to decode, so two probes in a row must fail. A single pass of the gradients must not take
    longer than ``probe_seconds``.
    """

    interval: float = 2.0
    probe_seconds: float = 4.0
    # What still runs when one of its models is gone may finish that soon.
    grace: float = 2.0
    # Pauses double from the first to the longest while no start comes to an answer; so many starts within the window
    # are enough in any case.
    first_pause: float = 1.0
    longest_pause: float = 30.0
    most_restarts: int = 6
    window: float = 600.0
    # What is asked: `explain`, or `classify` where nothing else is served.
    model: str = "explain"


def stop_on_signals() -> None:
    """Have SIGTERM and SIGINT raise ``KeyboardInterrupt``: once, for a second must not break off the orderly stop."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)


def supervise(server: TritonProcess, watch: Watch = Watch(), say: Callable[[str], None] = lambda message: None) -> None:
    """Watch a server that runs; returns never.

    Args:
        server: started.
        watch: how closely to look.
        say: called with a sentence about each restart.

    Raises:
        ServerError: it had to be started too often.
    """
    restarts: deque[float] = deque()
    pause = watch.first_pause
    while True:
        reason, was_well = trouble(server, watch)
        server.stop(watch.grace)
        if was_well:
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
    """Wait until something is wrong with a server; returns what, and whether it had been well before."""
    failures, was_well = 0, False
    while True:
        try:
            code = server.process.wait(1.0 if failures else watch.interval)
            return f"Triton ended with code {code}", was_well
        except subprocess.TimeoutExpired:
            pass
        try:
            probe_patiently(
                server.host, server.ports.http, server.ports.metrics, watch.model, seconds=watch.probe_seconds
            )
            failures, was_well = 0, True
        except ProbeError as failure:
            failures += 1
            if failures == 2 and server.process.poll() is None:
                return str(failure), was_well
