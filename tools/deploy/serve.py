"""The container's entry point: ``python3 -m tools.deploy.serve`` becomes Triton.

Settings come from the environment: MODEL_REPOSITORY (/models), MODELS (all, or classify alone), HOST (0.0.0.0),
HTTP_PORT, GRPC_PORT, METRICS_PORT (8000, 8001, 8002), CONNECTION_SECONDS (20), STOP_SECONDS (30), ADMIN_KEY or
ADMIN_KEY_FILE, OMP_NUM_THREADS (threads of each model; by the CPU quota). Arguments are further options of
``tritonserver``.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from tools.probe import leaving_file
from tools.triton.options import (
    Ports,
    SettingError,
    describe_threads,
    server_environment,
    server_options,
    whole_number,
)

# The models of a server that only predicts.
CLASSIFYING = ("preprocess", "classifier", "classify")


def command(settings: Mapping[str, str]) -> list[str]:
    """The command line of Triton for an environment's settings.

    Raises:
        SettingError: a setting is not valid, or the repository has no classifier.
    """
    repository = Path(settings.get("MODEL_REPOSITORY") or "/models")
    if not (repository / "classifier" / "1" / "model.pt").is_file():
        raise SettingError(f"{repository} has no exported classifier; python3 -m tools.deploy.prepare writes it")
    models = settings.get("MODELS") or "all"
    if models not in ("all", "classify"):
        raise SettingError(f"MODELS must be all or classify, not {models!r}")
    chosen = ["--model-control-mode=none"]
    if models == "classify":
        chosen = ["--model-control-mode=explicit", *(f"--load-model={name}" for name in CLASSIFYING)]
    host = settings.get("HOST") or "0.0.0.0"
    ports = Ports.from_settings(settings)
    options = server_options(repository, host, ports, _admin_key(settings), stop_seconds(settings))
    if age := connection_seconds(settings):
        options.append(f"--grpc-max-connection-age={1000 * age}")
    return ["tritonserver", *chosen, *options]


def stop_seconds(settings: Mapping[str, str]) -> int:
    """Seconds for requests in flight to finish when Triton stops.

    Raises:
        SettingError: STOP_SECONDS is not a whole number.
    """
    return whole_number(settings, "STOP_SECONDS", 30)


def connection_seconds(settings: Mapping[str, str]) -> int:
    """Age at which gRPC's connections end, once their requests are answered: clients then look for servers anew.

    0: never.

    Raises:
        SettingError: CONNECTION_SECONDS is not a whole number.
    """
    return whole_number(settings, "CONNECTION_SECONDS", 20)


def _admin_key(settings: Mapping[str, str]) -> str:
    """The operator's key; without one, a random key that nobody knows, which closes the restricted APIs."""
    if file := settings.get("ADMIN_KEY_FILE"):
        try:
            return Path(file).read_text().strip()
        except OSError as error:
            raise SettingError(f"ADMIN_KEY_FILE: {error}") from None
    return settings.get("ADMIN_KEY") or secrets.token_urlsafe(32)


def main() -> None:
    try:
        words = command(os.environ)
        environment = server_environment(os.environ)
        print(f"serve: threads {describe_threads(os.environ)}", flush=True)
    except SettingError as error:
        sys.exit(f"serve: {error}")
    leaving_file(Ports.from_settings(os.environ).http).unlink(missing_ok=True)  # of this container's last server
    os.execvpe(words[0], [*words, *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
