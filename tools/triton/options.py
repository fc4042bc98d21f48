"""How Triton is started: the options that the embedded server and the container share.

What differs between the two is where the binary and its backends lie (`tools/server.py`), and where it listens and what
it loads (`tools/deploy/serve.py`). Model configurations are the same files.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOCALHOST = "127.0.0.1"

# What a client that wants predictions does not need, and could harm others with.
RESTRICTED_APIS = "shared-memory,model-repository,logging,trace"
ADMIN_HEADER = "admin-key"


class SettingError(ValueError):
    """A setting that cannot be; the message names it."""


def whole_number(settings: Mapping[str, str], name: str, default: int) -> int:
    """A setting that is a whole number.

    Raises:
        SettingError: it is none.
    """
    value = settings.get(name) or str(default)
    if not value.isdecimal():
        raise SettingError(f"{name} must be a whole number, not {value!r}")
    return int(value)


@dataclass(frozen=True)
class Ports:
    """Where a server listens; Triton's own defaults."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @classmethod
    def from_settings(cls, settings: Mapping[str, str]) -> Ports:
        """HTTP_PORT, GRPC_PORT and METRICS_PORT, or Triton's defaults.

        Raises:
            SettingError: one of them is no number.
        """
        default = cls()
        return cls(
            whole_number(settings, "HTTP_PORT", default.http),
            whole_number(settings, "GRPC_PORT", default.grpc),
            whole_number(settings, "METRICS_PORT", default.metrics),
        )

    @classmethod
    def free(cls) -> Ports:
        """Three ports of this machine that nobody listens on now."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind((LOCALHOST, 0))
            return cls(*(each.getsockname()[1] for each in sockets))


def server_options(repository: Path, host: str, ports: Ports, admin_key: str, stop_seconds: int) -> list[str]:
    """Options of ``tritonserver``.

    Args:
        repository: the model repository.
        host: address to listen on.
        ports: where to listen there.
        admin_key: what opens the restricted APIs, sent as the header ``admin-key``.
        stop_seconds: how long requests in flight may take to finish when it stops.
    """
    return [
        f"--model-repository={repository}",
        f"--http-address={host}",
        f"--grpc-address={host}",
        f"--metrics-address={host}",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        f"--http-restricted-api={RESTRICTED_APIS}:{ADMIN_HEADER}={admin_key}",
        f"--grpc-restricted-protocol={RESTRICTED_APIS}:{ADMIN_HEADER}={admin_key}",
        f"--exit-timeout-secs={stop_seconds}",
    ]


# Threads of one model that spin for work take cores from the others. With GOMP_SPINCOUNT 10000 instead, a single
# client's explanation takes a twelfth less, but beside 8 of them a prediction's p95 is 3 times its idle one, not 1.5.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
