"""Explains many images: a bounded number at a time, in any order; a failure does not affect the others."""

from __future__ import annotations

import asyncio
import glob
import os
import sys
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from explain_client.aio import AsyncExplainClient
from explain_client.errors import ExplainError
from explain_client.results import Explanation

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
STDIN = "-"
HEATMAP_ENDING = ".heatmap.png"


def top_of(targets: str | Sequence[int | str] | None) -> int:
    """The number of ``topN``; 0 for classes that are listed, and for none."""
    return int(targets.removeprefix("top")) if isinstance(targets, str) else 0


@dataclass(frozen=True)
class Source:
    """An image of a run: its name, its file (None: standard input), and the file of its heatmap.

    Where several classes are explained, each has a heatmap of its own beside that.
    """

    name: str
    path: Path | None
    heatmap: Path

    @property
    def is_older(self) -> bool:
        """Whether the image is older than its heatmap, or as old, where it has one."""
        if self.path is None or not self.heatmap.is_file():
            return False
        return self.path.exists() and self.path.stat().st_mtime_ns <= self.heatmap.stat().st_mtime_ns

    def heatmap_of(self, explained_class: int) -> Path:
        """The file of the heatmap of one of several classes."""
        stem = self.heatmap.name.removesuffix(HEATMAP_ENDING)
        return self.heatmap.with_name(f"{stem}.{explained_class}{HEATMAP_ENDING}")

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: it cannot be read.
        """
        return sys.stdin.buffer.read() if self.path is None else self.path.read_bytes()


@dataclass(frozen=True)
class Outcome:
    """The result for an image: its bytes and an explanation for each class that was asked for, or an error.

    ``own_milliseconds`` is the image's share of the run's time: it counts a moment in which n images were in flight as
    one n-th. Of one image at a time it is all of its time; of many it leaves out the wait for the others.
    """

    source: Source
    file: bytes
    explanations: Sequence[Explanation]
    error: ExplainError | OSError | None
    own_milliseconds: float


class SharedClock:
    """Time that those who are under way divide among themselves."""

    def __init__(self) -> None:
        self._share, self._under_way, self._at = 0.0, 0, time.perf_counter()

    def enter(self) -> float:
        """Begin; the result is for ``leave``."""
        self._advance()
        self._under_way += 1
        return self._share

    def leave(self, entered: float) -> float:
        """End; seconds of one's own."""
        self._advance()
        self._under_way -= 1
        return self._share - entered

    def _advance(self) -> None:
        now = time.perf_counter()
        self._share += (now - self._at) / max(self._under_way, 1)
        self._at = now


def find_sources(arguments: Sequence[str], out: Path) -> list[Source]:
    """The images of files, folders (with subfolders), patterns and ``-``; each file once.

    Heatmaps of an earlier run, which end with ``.heatmap.png``, are left out; patterns of the shell find them, too. One
    that is the only argument is meant.

    A heatmap's path below ``out`` is that of its image below the folder. Where two would be the same, the later one
    keeps its image's suffix.
    """
    places: dict[Path | None, Path] = {}  # image -> path of its heatmap below `out`, without suffix
    for argument in arguments:
        if argument == STDIN:
            places.setdefault(None, Path("stdin"))
        elif os.path.isdir(argument):
            for file in sorted(Path(argument).rglob("*")):
                if file.suffix.lower() in SUFFIXES and not file.name.endswith(HEATMAP_ENDING) and file.is_file():
                    places.setdefault(file, file.relative_to(argument).with_suffix(""))
        elif glob.has_magic(argument) and not os.path.exists(argument):
            for match in map(Path, sorted(glob.glob(argument, recursive=True))):
                if not match.name.endswith(HEATMAP_ENDING) and match.is_file():
                    places.setdefault(match, Path(match.stem))
        elif len(arguments) == 1 or not argument.endswith(HEATMAP_ENDING):
            places.setdefault(Path(argument), Path(Path(argument).stem))
    taken: dict[Path, int] = {}
    sources = []
    for path, place in places.items():
        number = taken.get(place, 0)
        taken[place] = number + 1
        if number and path is not None:
            place = place.with_name(path.name if number == 1 else f"{path.name}.{number}")
        name = "stdin" if path is None else str(path)
        sources.append(Source(name, path, out / place.with_name(f"{place.name}{HEATMAP_ENDING}")))
    return sources


async def explain_all(
    client: AsyncExplainClient,
    sources: Iterable[Source],
    concurrency: int,
    targets: str | Sequence[int] | None = None,
    **asked: Any,
) -> AsyncGenerator[Outcome, None]:
    """Explain images, at most ``concurrency`` at a time; yields each outcome as it comes.

    Args:
        client: asks the server.
        sources: the images.
        concurrency: requests in flight.
        targets: several classes to explain; ``topN`` for the likeliest but the one that is subtracted.
        asked: arguments of ``AsyncExplainClient.explain``.
    """

    async def explanations_of(file: bytes) -> Sequence[Explanation]:
        if targets is None:
            return [await client.explain(file, **asked)]
        classes = targets
        if isinstance(classes, str):
            count = top_of(classes)
            likeliest = [each.index for each in await client.classify(file, top_k=count + 1)]
            classes = [index for index in likeliest if index != asked.get("contrast")][:count]
        return await client.explain(file, targets=classes, **asked)

    clock = SharedClock()

    async def explain(source: Source) -> Outcome:
        file, failure = b"", None
        explanations: Sequence[Explanation] = ()
        entered = clock.enter()
        try:
            file = source.read()
            explanations = await explanations_of(file)
        except (ExplainError, OSError) as error:
            failure = error
        return Outcome(source, file, explanations, failure, 1e3 * clock.leave(entered))

    waiting: Iterator[Source] = iter(sources)
    under_way: set[asyncio.Task[Outcome]] = set()
    try:
        while True:
            while len(under_way) < concurrency and (source := next(waiting, None)) is not None:
                under_way.add(asyncio.create_task(explain(source)))
            if not under_way:
                return
            done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in under_way:
            task.cancel()
