"""Memory of processes, from /proc, and samples of it during a benchmark."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Sampler:
    """Calls ``take`` every ``every`` seconds in a thread while the context is open; ``samples`` are its results."""

    def __init__(self, take: Callable[[], Any], every: float) -> None:
        self._take, self._every = take, every
        self.samples: list[Any] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.samples.append(self._take())
            if self._is_over.wait(self._every):
                return


def session(leader: int) -> Iterator[int]:
    """Process numbers of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[3]) == leader:
                yield int(folder.name)
        except (OSError, ValueError):
            continue  # it ended meanwhile


def own_mb(process: int) -> float:
    """A process's memory in MB without mapped files.

    It is the kernel's own count: adding up shares of pages would take a tenth of the machine.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1e3


def memory_sampler(leader: int) -> Sampler:
    """Samples the memory of a session's processes, in MB."""
    return Sampler(lambda: sum(map(own_mb, session(leader))), 0.5)
