"""A Docker engine of the tests' own, stand-ins for the images that cannot be pulled, and one compose project.

The engine is a child of the test session with its own data and socket. It is removed with all that it made on the
machine: `traces` finds what is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tools.bench.perf import libraries
from tools.paths import ROOT
from tools.triton.installation import wheel_folder
from tools.triton.options import Ports

STAND_INS = Path(__file__).parent / "stand_ins"
# Debian's packages are named in CONTRIBUTING.md.
PROGRAMS = ("dockerd", "docker", "docker-compose", "mmdebstrap", "setpriv", "iptables-save", "prometheus")
# What NVIDIA's images have and the wheels' binaries need.
PACKAGES = "python3-pip,libpython3.11,ca-certificates,libb64-0d,libarchive13,libcurl4,libnuma1,nginx-light"
PYTHON = "3.11"  # Debian bookworm's
# What the images are made of, without a developer's .env and what was built or exported here.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".env", "out", "weights", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build"
)
# The group of all containers.
CGROUP = f"explaining-{os.getpid()}"
# What an engine makes outside its own folder.
SYSTEM_PATHS = [
    Path(name) for name in ("/run/docker", "/run/containerd", "/etc/docker", "/etc/docker/key.json", "/var/lib/docker")
]


def missing() -> str | None:
    """Why no engine can run here, or None."""
    if os.geteuid() != 0:
        return "an engine must be started as root"
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)}"
    return None


class Engine:
    """A Docker engine as a context manager.

    Args:
        folder: its data, its socket and its log; removed at the end, except the data if ``keep`` is set.
        keep: a folder for the data that another session may use again.
    """

    def __init__(self, folder: Path, keep: Path | None = None) -> None:
        self.folder = folder
        self.data = keep or folder / "data"
        self.log = folder / "dockerd.log"
        socket = f"unix://{folder / 'docker.sock'}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "COMPOSE_"))},
            "DOCKER_HOST": socket,
            "DOCKER_CONFIG": str(folder / "client"),
            # BuildKit would pull the frontend that the Dockerfile's first line names.
            "DOCKER_BUILDKIT": "0",
        }
        self._words = [
            # The engine ends with the session, however that ends.
            *("setpriv", "--pdeathsig", "TERM"),
            *("dockerd", "--data-root", str(self.data), "--exec-root", str(folder / "exec")),
            *("--host", socket, "--pidfile", str(folder / "docker.pid"), "--bridge", "none"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{CGROUP}"),
        ]

    def __enter__(self) -> Engine:
        self._absent = [path for path in SYSTEM_PATHS if not path.exists()]
        self._rules, self._forward = _firewall(), _forwarding().read_text()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(self._words, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(self._answers, 60, self.log.read_text)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        return self.try_docker("version").returncode == 0

    def __exit__(self, *_: object) -> None:
        if running := self.try_docker("ps", "--quiet").stdout.split():
            self.try_docker("kill", *running)
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for number in self._wait_for_processes():
            os.kill(number, signal.SIGKILL)
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in sorted((name for name in mounts if name.startswith(str(self.folder))), reverse=True):
            subprocess.run(["umount", mount], check=False)
        _restore_firewall(self._rules)
        _forwarding().write_text(self._forward)
        for path in [*self._absent, self.folder]:
            if path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        for group in sorted(Path("/sys/fs/cgroup").glob(f"**/{CGROUP}"), reverse=True):
            for inner in sorted(group.glob("**/"), reverse=True):
                inner.rmdir()

    def _wait_for_processes(self) -> list[int]:
        """Processes of the engine that have not ended some seconds after it."""
        until = time.monotonic() + 20
        while left := list(processes_of(self.folder)):
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        return left

    def try_docker(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", *words], env=self.environment, capture_output=True, text=True, check=False, **options
        )

    def docker(self, *words: str) -> str:
        """What a command of the client prints.

        Raises:
            AssertionError: it failed.
        """
        result = self.try_docker(*words)
        assert result.returncode == 0, f"docker {' '.join(words)}\n{result.stdout}{result.stderr}"
        return result.stdout

    def inspect(self, what: str) -> dict[str, Any]:
        """Everything the engine knows of an image or a container."""
        (answer,) = json.loads(self.docker("inspect", what))
        return answer

    def build_stand_ins(self, images: Mapping[str, str]) -> None:
        """Make an image of each target of `stand_ins/Dockerfile`.

        Args:
            images: the target's name -> the image's name.
        """
        if self.try_docker("image", "inspect", "stand-in/debian:bookworm").returncode:
            archive = self.folder / "debian.tar"
            words = ["mmdebstrap", "--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io", f"--include={PACKAGES}"]
            subprocess.run([*words, "bookworm", str(archive)], check=True)
            self.docker("import", str(archive), "stand-in/debian:bookworm")
            archive.unlink()
        context = self.folder / "context"
        _fill(context)
        for target, image in images.items():
            words = ["--file", str(STAND_INS / "Dockerfile"), "--target", target, "--tag", image]
            # Containers of a build use the machine's network: there is no other for them.
            self.docker("build", "--quiet", "--network", "host", *words, str(context))
        shutil.rmtree(context)


def _fill(context: Path) -> None:
    """The files that the stand-ins are made of."""
    wheel = wheel_folder("pytriton") / "tritonserver"
    triton = context / "tritonserver"
    shutil.copytree(wheel / "bin", triton / "bin")
    shutil.copytree(wheel.parent.parent / "nvidia_pytriton.libs", triton / "lib", symlinks=True)
    if (wheel / "lib").is_dir():
        shutil.copytree(wheel / "lib", triton / "lib", symlinks=True, dirs_exist_ok=True)
    shutil.copytree(wheel / "backends" / "python", triton / "backends" / "python")
    shutil.copy(wheel / "python_backend_stubs" / PYTHON / "triton_python_backend_stub", triton / "backends" / "python")
    shutil.copytree(ROOT / "tools" / "triton" / "pytorch_backend", triton / "backends" / "pytorch")
    entry_point = context / "nvidia_entrypoint.sh"
    entry_point.write_text('#!/bin/sh\nexec "$@"\n')
    entry_point.chmod(0o755)
    trusted = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    shutil.copy(trusted or "/etc/ssl/certs/ca-certificates.crt", context / "ca-certificates.crt")
    with libraries() as environment:
        shutil.copytree(environment["LD_LIBRARY_PATH"].split(os.pathsep)[0], context / "perf_libraries")
    shutil.copy(ROOT / ".venv" / "bin" / "perf_analyzer", context)
    shutil.copy(shutil.which("prometheus") or "", context)


class Project:
    """This repository's compose project, in a copy of it.

    Args:
        engine: runs it.
        folder: for the copy.
        settings: as in `.env`.
    """

    name = "explaining"

    def __init__(self, engine: Engine, folder: Path, settings: Mapping[str, str]) -> None:
        self.engine, self.folder, self.ports = engine, folder, Ports.free()
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        (folder / "weights").mkdir()  # or Docker makes it
        self.settings = {
            "HTTP_PORT": str(self.ports.http),
            "GRPC_PORT": str(self.ports.grpc),
            "METRICS_PORT": str(self.ports.metrics),
            **settings,
        }

    def compose(self, *words: str, **settings: str) -> str:
        """What docker-compose prints.

        Raises:
            AssertionError: it failed.
        """
        result = subprocess.run(
            ["docker-compose", "--project-name", self.name, "--profile", "cpu", *words],
            cwd=self.folder,
            env={**self.engine.environment, **self.settings, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"docker-compose {' '.join(words)}\n{result.stdout[-20000:]}{self._failures()}"
        return result.stdout

    def _failures(self) -> str:
        """What the containers printed that ended with an error."""
        ended = ("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={self.name}")
        containers = [self.engine.inspect(each) for each in self.engine.docker(*ended).split()]
        failed = [each for each in containers if each["State"]["ExitCode"]]
        logs = [(each["Name"], self.engine.try_docker("logs", each["Id"])) for each in failed]
        return "".join(f"\n{name} ended:\n{log.stdout[-5000:]}{log.stderr[-5000:]}" for name, log in logs)

    def override(self, services: Mapping[str, Any]) -> None:
        """Change services by a file that compose reads after its own."""
        content = {"version": "3.9", "services": services}
        (self.folder / "docker-compose.override.yml").write_text(yaml.safe_dump(content))

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.compose("ps", "--all", "--quiet", service).strip()

    def state(self, service: str) -> dict[str, Any]:
        """The state of a service's container, as Docker says it."""
        return self.engine.inspect(self.container(service))["State"]

    def logs(self, service: str) -> str:
        """The end of what a service's container printed."""
        log = self.engine.try_docker("logs", "--tail", "200", self.container(service))
        return log.stdout + log.stderr

    def processes(self, service: str, *parts: str) -> list[int]:
        """The machine's numbers of the processes in a service's container whose command lines contain some parts."""
        listed = self.engine.try_docker("top", self.container(service), "-eo", "pid").stdout.split()[1:]
        return [int(number) for number in listed if all(part in _command_line(number) for part in parts)]

    def left(self) -> list[str]:
        """What the engine has of the project: containers, volumes and networks."""
        label = f"label=com.docker.compose.project={self.name}"
        kinds = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        return [line for words in kinds for line in self.engine.docker(*words, "-q", "--filter", label).split()]


def _command_line(number: str) -> str:
    """Of a process of this machine; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
    return ""


def memory_lock() -> int:
    """The memory that a container may lock: no limit, if this machine lets the engine set that."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    effective = re.findall(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    cap_sys_resource = 1 << 24
    return -1 if hard < 0 or int(effective[0], 16) & cap_sys_resource else hard


def wait_for(condition: Any, seconds: float, explain: Any = lambda: "") -> Any:
    """The first true value of a condition; errors of connections count as false.

    Raises:
        AssertionError: there was none in time; its message is what ``explain`` returns.
    """
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if value := condition():
                return value
        assert time.monotonic() < until, explain()
        time.sleep(0.3)


def processes_of(folder: Path) -> Iterator[int]:
    """Processes of this machine that run an engine in a folder, or are in one of its containers."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            runs = (process / "comm").read_text().startswith(("dockerd", "containerd", "runc"))
            in_folder = f"{folder}/" in (process / "cmdline").read_text()
            if (runs and in_folder) or f"/{CGROUP}/" in (process / "cgroup").read_text():
                yield int(process.name)


def traces(folder: Path) -> set[str]:
    """What an engine with a folder may leave on a machine: processes, interfaces, rules, mounts, groups, files."""
    return set(_traces(folder))


def _traces(folder: Path) -> Iterator[str]:
    for process in processes_of(folder):
        yield f"process {process}"
    for interface in Path("/sys/class/net").iterdir():
        yield f"interface {interface.name}"
    for rule in _firewall():
        yield f"rule {rule}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        yield f"mount {line.split()[4]}"
    for group in Path("/sys/fs/cgroup").glob(f"**/{CGROUP}"):
        yield f"group {group}"
    for path in SYSTEM_PATHS:
        if path.exists():
            yield f"path {path}"
    yield f"forwarding {_forwarding().read_text().strip()}"


def _forwarding() -> Path:
    return Path("/proc/sys/net/ipv4/ip_forward")


def _firewall() -> list[str]:
    """Chains and rules, each after its table's name."""
    rules, table = [], ""
    for line in subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(("-A", ":")) and " ACCEPT [" not in line:  # a chain as it is without any rule
            rules.append(f"{table} {line.split('[')[0].strip() if line.startswith(':') else line}")
    return rules


def _restore_firewall(before: list[str]) -> None:
    """Delete the rules and chains that were added, and no others."""
    added = [rule.split(" ", 1) for rule in _firewall() if rule not in before]
    chains = [(table, line[1:].split()) for table, line in added if line.startswith(":")]
    for table, line in added:
        if line.startswith("-A"):
            subprocess.run(["sh", "-c", f"iptables -t {table} -D {line[3:]}"], check=False)
    for table, (chain, policy) in chains:
        if policy == "-":
            subprocess.run(["iptables", "-t", table, "-X", chain], check=False)
        else:
            was = [rule.split()[2] for rule in before if rule.startswith(f"{table} :{chain} ")]
            subprocess.run(["iptables", "-t", table, "-P", chain, was[0] if was else "ACCEPT"], check=False)
