"""The container's supervisor: ``python3 -m tools.deploy.supervise`` starts Triton and restarts it when it fails.

For compose and others that have no probes; Kubernetes' probes do the same for `tools.deploy.serve`. On SIGTERM it first
lets requests end, as `tools.deploy.drain` does before Kubernetes' SIGTERM. Settings are those of `serve.py`, and

- PROBE_SECONDS (4): if one pass can exceed it, raise it; otherwise healthy servers are restarted.
- DRAIN_SECONDS (20): longest time in which requests under way may end; new ones are still answered.

Arguments are further options of ``tritonserver``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tools.deploy.drain import drain
from tools.deploy.serve import command, stop_seconds
from tools.probe import leaving_file, served_model
from tools.triton.options import LOCALHOST, Ports, SettingError, describe_threads, server_environment, whole_number
from tools.triton.process import ServerError, TritonProcess
from tools.triton.supervisor import Watch, stop_on_signals, supervise

START_SECONDS = 300.0
# With STOP_SECONDS it must be shorter than what Docker waits before it kills the container.
DRAIN_SECONDS = 20


class ContainerServer(TritonProcess):
    """Triton as `serve.py` starts it, in a process of its own.

    Args:
        settings: those of `serve.py`.
        options: further options of ``tritonserver``.

    Raises:
        SettingError: a setting is not valid, or the repository has no classifier.
    """

    def __init__(self, settings: Mapping[str, str], options: Sequence[str] = ()) -> None:
        self._words = [*command(settings), *options]
        self._environment = server_environment(settings)
        super().__init__(LOCALHOST, Ports.from_settings(settings), START_SECONDS, stop_seconds(settings))

    def _launch(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._words, self.region_option], env=self._environment, start_new_session=True)


def main() -> None:
    def say(message: str) -> None:
        print(f"supervise: {message}", flush=True)

    stop_on_signals()
    try:
        say(f"threads {describe_threads(os.environ)}")
        watch = Watch(
            probe_seconds=whole_number(os.environ, "PROBE_SECONDS", 4),
            model=served_model(os.environ),
        )
        most = whole_number(os.environ, "DRAIN_SECONDS", DRAIN_SECONDS)
        with ContainerServer(os.environ, sys.argv[1:]) as server:
            leaving_file(server.ports.http).unlink(missing_ok=True)  # of this container's last server
            try:
                supervise(server, watch, say)
            except KeyboardInterrupt:
                drain(server.ports, age_seconds=0, most_seconds=most, say=say)
                raise
    except (SettingError, ServerError) as error:
        sys.exit(f"supervise: {error}")
    except KeyboardInterrupt:
        pass  # the server has stopped in order


if __name__ == "__main__":
    main()
