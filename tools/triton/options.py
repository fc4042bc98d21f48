"""How Triton is started: the options that the embedded server and the container share.

`tools/server.py` adds the paths of the binary and its backends, `tools/deploy/serve.py` the address and the models to
load. Model configurations are the same files.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpu_quota import THREADS_VARIABLE, chosen_threads, cpu_share

LOCALHOST = "127.0.0.1"

# APIs that inference does not need, and that a client could use to harm others.
RESTRICTED_APIS = "shared-memory,model-repository,logging,trace"
ADMIN_HEADER = "admin-key"


class SettingError(ValueError):
    """A setting is not valid; the message names it."""


def whole_number(settings: Mapping[str, str], name: str, default: int) -> int:
    """A setting that is a whole number.

    Raises:
        SettingError: it is not one.
    """
    value = settings.get(name) or str(default)
    if not value.isdecimal():
        raise SettingError(f"{name} must be a whole number, not {value!r}")
    return int(value)


@dataclass(frozen=True)
class Ports:
    """Ports of a server, by default Triton's."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @classmethod
    def from_settings(cls, settings: Mapping[str, str]) -> Ports:
        """HTTP_PORT, GRPC_PORT and METRICS_PORT, or Triton's defaults.

        Raises:
            SettingError: one of them is not a whole number.
        """
        default = cls()
        return cls(
            whole_number(settings, "HTTP_PORT", default.http),
            whole_number(settings, "GRPC_PORT", default.grpc),
            whole_number(settings, "METRICS_PORT", default.metrics),
        )

    @classmethod
    def free(cls) -> Ports:
        """Three ports of this machine that are free now."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for bound in sockets:
                bound.bind((LOCALHOST, 0))
            return cls(*(bound.getsockname()[1] for bound in sockets))


def server_options(repository: Path, host: str, ports: Ports, admin_key: str, stop_seconds: int) -> list[str]:
    """Options of ``tritonserver``.

    Args:
        repository: the model repository.
        host: address to listen on.
        ports: ports to listen on.
        admin_key: key to the restricted APIs, sent as the header ``admin-key``.
        stop_seconds: time for requests in flight to finish when it stops.
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
        # The configs are complete. To complete them Triton would start each model's process twice, and import torch in
        # each: ready after 13 s instead of 7 (2 cores).
        "--disable-auto-complete-config",
    ]


# Threads of one model that spin for work take cores from other models. With GOMP_SPINCOUNT 10000 instead, a single
# client's explanation takes 8 % less time, but beside 8 clients a prediction's p95 is 3 times its idle p95, not 1.5.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


def server_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Triton's environment: the settings, and the number of threads that each model computes with.

    PyTorch and libtorch's backend read that number from OMP_NUM_THREADS. If it is not among the settings, it follows
    the CPU quota.

    Args:
        settings: the environment of the process that starts Triton.

    Raises:
        SettingError: OMP_NUM_THREADS is not a whole number above 0.
    """
    threads, _ = _threads(settings)
    return {**ENVIRONMENT, **settings, THREADS_VARIABLE: settings.get(THREADS_VARIABLE) or str(threads)}


def describe_threads(settings: Mapping[str, str]) -> str:
    """How many threads each model computes with, and why, in a few words.

    Raises:
        SettingError: OMP_NUM_THREADS is not a whole number above 0.
    """
    threads, why = _threads(settings)
    return f"{threads} for each model: {why}"


def _threads(settings: Mapping[str, str]) -> tuple[int, str]:
    try:
        threads = chosen_threads(settings)
    except ValueError as error:
        raise SettingError(str(error)) from None
    if threads is not None:
        return threads, f"{THREADS_VARIABLE} is set"
    share = cpu_share()
    return share.threads, str(share)
