"""The container's Triton, watched: ``python3 -m tools.deploy.supervise`` starts it and starts it anew when it fails.

For where nothing else does, as under compose; Kubernetes' own probes do the same for `tools.deploy.serve`. Settings are
those of `serve.py`, and PROBE_SECONDS (4), within which something must have gone on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from tools.deploy.serve import command, stop_seconds
from tools.probe import served_model
from tools.triton.options import ENVIRONMENT, LOCALHOST, Ports, SettingError, whole_number
from tools.triton.process import ServerError, TritonProcess
from tools.triton.supervisor import Watch, stop_on_signals, supervise

START_SECONDS = 300.0


class ContainerServer(TritonProcess):
    """Triton as `serve.py` would start it, as a process of its own.

    Args:
        settings: those of `serve.py`.

    Raises:
        SettingError: they ask for what cannot be.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._words = command(settings)
        super().__init__(LOCALHOST, Ports.from_settings(settings), START_SECONDS, stop_seconds(settings))

    def _launch(self) -> subprocess.Popen[bytes]:
        environment = {**ENVIRONMENT, **os.environ}
        return subprocess.Popen([*self._words, self.region_option], env=environment, start_new_session=True)


def main() -> None:
    stop_on_signals()
    try:
        watch = Watch(
            probe_seconds=whole_number(os.environ, "PROBE_SECONDS", 4),
            model=served_model(os.environ),
        )
        with ContainerServer(os.environ) as server:
            supervise(server, watch, say=lambda message: print(f"supervise: {message}", flush=True))
    except (SettingError, ServerError) as error:
        sys.exit(f"supervise: {error}")
    except KeyboardInterrupt:
        pass  # it has stopped in order


if __name__ == "__main__":
    main()
