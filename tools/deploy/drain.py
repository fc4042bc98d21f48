"""Let a server finish what it has before it is stopped: ``python3 -m tools.deploy.drain``, Kubernetes' ``preStop``.

Readiness fails from now on (`tools.probe --ready`), but requests are answered. The command ends when clients have had
the time to turn to other servers and nothing is under way, streams included. Settings come from the environment:
CONNECTION_SECONDS (20), after which `tools.deploy.serve` makes clients look for servers anew; DRAIN_SECONDS (240), the
longest wait; HTTP_PORT and METRICS_PORT. Exit status 0: nothing is under way; 1: the time is over, or the server hangs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from tools.deploy.serve import connection_seconds
from tools.probe import (
    DONE,
    GRADIENTS_DONE,
    PENDING,
    STREAMS_ENDED,
    NoAnswerError,
    ProbeError,
    leaving_file,
    read_metrics,
    total,
)
from tools.triton.options import LOCALHOST, Ports, SettingError, whole_number

DRAIN_SECONDS = 240
# Nothing is under way if nothing waits and no counter has changed for this long: one image may take 4 s to decode.
QUIET_SECONDS = 5.0
POLL_SECONDS = 0.5
# A server of which something waits while no counter changes hangs: nobody should wait for it. Kubernetes runs `preStop`
# before it restarts such a container, too.
STUCK_SECONDS = 30.0
# gRPC closes a connection up to a tenth after its age. Its clients then look up the servers, by default at most every
# 30 s, so that one may still open a connection to this server; and a second more for the answer.
AGE_FACTOR, LOOK_UP_SECONDS, ANSWER_SECONDS = 1.1, 30.0, 1.0


def drain(
    ports: Ports,
    age_seconds: float,
    most_seconds: float,
    quiet_seconds: float = QUIET_SECONDS,
    look_up_seconds: float = LOOK_UP_SECONDS,
    host: str = LOCALHOST,
    say: Callable[[str], None] = lambda message: None,
) -> bool:
    """Wait until a server has nothing under way; returns whether that is so.

    Args:
        ports: of the server.
        age_seconds: age of the connections that it closes; 0 if it closes none.
        most_seconds: longest wait.
        quiet_seconds: how long nothing may happen until nothing is under way; longer than any step of a request.
        look_up_seconds: how long clients may go by what they last looked up.
        host: of the server.
        say: called with a message at the end.
    """
    with open(os.open(leaving_file(ports.http), os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)):
        pass  # the file alone says it
    started = quiet_since = moved = time.monotonic()
    told = started + (max(AGE_FACTOR * age_seconds, look_up_seconds) + ANSWER_SECONDS if age_seconds else 0.0)
    before = None
    while (now := time.monotonic()) < started + most_seconds:
        try:
            series = read_metrics(host, ports.metrics)
        except NoAnswerError:
            before = None  # it is busy
        except ProbeError as error:
            say(f"there is no server: {error}")
            return True
        else:
            done, waiting = total(series, *DONE, *GRADIENTS_DONE, *STREAMS_ENDED), total(series, *PENDING)
            if done != before or not waiting:
                moved = now
            if waiting or done != before:
                before, quiet_since = done, now
            elif now >= max(told, quiet_since + quiet_seconds):
                say(f"nothing is under way after {now - started:.0f} s")
                return True
        if now >= moved + STUCK_SECONDS:
            say(f"requests wait, and none has made progress for {now - moved:.0f} s")
            return False
        time.sleep(POLL_SECONDS)
    say(f"requests are under way after {most_seconds:g} s")
    return False


def main() -> None:
    try:
        ports, age = Ports.from_settings(os.environ), connection_seconds(os.environ)
        most = whole_number(os.environ, "DRAIN_SECONDS", DRAIN_SECONDS)
    except SettingError as error:
        sys.exit(f"drain: {error}")
    is_done = drain(ports, age, most, say=lambda message: print(f"drain: {message}", flush=True))
    sys.exit(0 if is_done else 1)


if __name__ == "__main__":
    main()
