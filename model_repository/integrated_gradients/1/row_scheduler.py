"""Decides whose rows come next: the order of jobs and paths, and the chunks they share. No tensors.

A job is a ``Task`` here. Its images, one for each noise sample, become paths one by one, and a path has rows. Each
chunk is one forward and backward pass, of at most ``limit`` rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from request_admission import RequestStart

# A short job overtakes a longer one until ten times the longer job's rows have been passed since that came. So short
# jobs come first, and a long one is overtaken only by those that come before its turn.
FAIRNESS_FACTOR = 10
# Interval between full cancellation checks.
CANCELLATION_CHECK_SECONDS = 1.0
# A job whose deadline is nearer than this goes before all others.
URGENT_SECONDS = 2.0
# Most paths that have begun and not ended for each row of a chunk, which bounds their memory.
MOST_PATHS, MOST_URGENT_PATHS = 2, 4

Priority = tuple[float, float]


class Path(Protocol):
    """The part of a path that the scheduler uses."""

    @property
    def rows_left(self) -> int:
        """Rows that the present stage still takes, if one chunk takes them all."""

    @property
    def overlap(self) -> int:
        """Rows at the end of a piece that the next piece begins with."""

    @property
    def shape(self) -> Hashable:
        """Only paths of equal shape share a chunk."""

    @property
    def points(self) -> Hashable:
        """Equal for paths whose next rows are the same points of the same path; None if they may not be shared."""


@dataclass(eq=False)
class Task:
    """A waiting or running job.

    Attributes:
        expected_rows: rows that it is expected to take.
        rows_before: rows that the engine had passed when it came.
        samples_left: paths that are still to be started.
        deadline: by ``time.monotonic``; None if there is none.
        request_start: of its request.
        is_cancelled: whether its client no longer waits.
        sharing_key: tasks of equal keys begin with the same points of the same path; None if it may share none.
        needs_all: whether it takes all of its paths, even after its deadline.
        samples_under_way: paths that have been started and have not ended.
        rows_spent: rows passed so far.
    """

    expected_rows: int
    rows_before: int
    samples_left: int = 1
    deadline: float | None = None
    request_start: RequestStart = field(default_factory=RequestStart)
    is_cancelled: Callable[[], bool] = lambda: False
    sharing_key: Hashable = None
    needs_all: bool = False
    samples_under_way: int = field(default=0, init=False)
    rows_spent: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._samples = self.samples_left

    @property
    def priority(self) -> Priority:
        """Ascending: the nearest deadline first, then by the rows passed since it came.

        A job that takes more rows than expected falls back.
        """
        turn = self.rows_before + FAIRNESS_FACTOR * max(self.expected_rows, self.rows_spent)
        return (self.deadline if self.deadline is not None and self.is_urgent else math.inf), turn

    @property
    def is_urgent(self) -> bool:
        """Whether its deadline is nearer than ``URGENT_SECONDS``, or over."""
        return self.deadline is not None and time.monotonic() > self.deadline - URGENT_SECONDS

    @property
    def is_late(self) -> bool:
        """Whether its deadline is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def is_started(self) -> bool:
        return self.samples_left < self._samples

    @property
    def next_points(self) -> tuple[Hashable, int]:
        """Paths for which this is equal have the same points, if the task shares any."""
        return self.sharing_key, self._samples - self.samples_left

    @property
    def is_finished(self) -> bool:
        return not self.samples_left and not self.samples_under_way

    @property
    def rows_left(self) -> int:
        """Expected rows of the paths that are not started yet."""
        return self.expected_rows * self.samples_left // self._samples

    def is_given_up(self, check_cancelled: bool) -> bool:
        """Whether its request waited too long for its first row or, with ``check_cancelled``, is cancelled."""
        return self.request_start.is_too_late or (check_cancelled and self.is_cancelled())


TaskT = TypeVar("TaskT", bound=Task)
PathT = TypeVar("PathT", bound=Path)


@dataclass(frozen=True)
class Piece(Generic[TaskT, PathT]):
    """Rows of a path in a chunk.

    Attributes:
        task, path: whose rows they are.
        rows: of the chunk.
        companions: tasks and paths of other classes, whose rows are the same points.
    """

    task: TaskT
    path: PathT
    rows: slice
    companions: tuple[tuple[TaskT, PathT], ...] = ()

    @property
    def members(self) -> tuple[tuple[TaskT, PathT], ...]:
        """All tasks and paths that advance with it."""
        return ((self.task, self.path), *self.companions)


class RowScheduler(Generic[TaskT, PathT]):
    """Tasks and paths of a call, in order of their priority.

    Args:
        limit: rows of a chunk.
        shares: whether paths with the same points share rows.
    """

    def __init__(self, limit: int, shares: bool = False) -> None:
        self.limit, self._shares = limit, shares
        self._waiting: list[TaskT] = []  # tasks with paths to start
        self._under_way: list[tuple[TaskT, PathT]] = []
        self._finished: list[TaskT] = []
        self._fresh: dict[int, tuple[Hashable, int]] = {}  # sharing key and number of paths without a row, by identity
        self._checked_all = time.monotonic()

    def add(self, task: TaskT) -> None:
        """Add a waiting task."""
        self._waiting.append(task)

    @property
    def has_rows(self) -> bool:
        """Whether a path is under way."""
        return bool(self._under_way)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not self._under_way and not any(task.samples_left for task in self._waiting)

    @property
    def deadline_paths(self) -> int:
        """Paths with a deadline, started or not."""
        started = sum(task.deadline is not None for task, _ in self._under_way)
        return started + sum(task.samples_left for task in self._waiting if task.deadline is not None)

    def rows_before(self, priority: Priority) -> int:
        """Expected rows that go before a task of that priority. Safe to call from any thread."""
        waiting = sum(task.rows_left for task in tuple(self._waiting) if task.priority <= priority)
        return waiting + sum(path.rows_left for task, path in tuple(self._under_way) if task.priority <= priority)

    def drop_given_up(self) -> list[TaskT]:
        """Remove the tasks that nobody waits for, and return them.

        A cancellation check may ask another process. So before each chunk only the next tasks are checked, and all of
        them every ``CANCELLATION_CHECK_SECONDS``.
        """
        checks_all = time.monotonic() >= self._checked_all + CANCELLATION_CHECK_SECONDS
        if checks_all:
            self._checked_all = time.monotonic()
        waiting = [task for task in self._waiting if task.samples_left]
        checked = {*waiting[: self.limit], *(task for task, _ in self._under_way)}
        tasks = dict.fromkeys([*waiting, *(task for task, _ in self._under_way)])
        given_up = {task: None for task in tasks if task.is_given_up(checks_all or task in checked)}
        if given_up:
            self._waiting = [task for task in self._waiting if task not in given_up]
            self._under_way = [(task, path) for task, path in self._under_way if task not in given_up]
        return list(given_up)

    def next_to_start(self) -> TaskT | None:
        """The task whose next path has rows in the next chunk.

        Paths are started as late as possible, since each takes memory; but a path that can share the rows of another
        one is started with it.
        """
        self._waiting = sorted((task for task in self._waiting if task.samples_left), key=lambda task: task.priority)
        self._under_way.sort(key=lambda pair: pair[0].priority)
        if not self._waiting:
            return None
        task = self._waiting[0]
        started = sum(each.samples_under_way for each in {*self._waiting, *(other for other, _ in self._under_way)})
        if self._under_way and started >= (MOST_URGENT_PATHS if task.is_urgent else MOST_PATHS) * self.limit:
            return None
        before = sum(path.rows_left for (other, path), *_ in self._groups() if other.priority <= task.priority)
        if before < self.limit:
            return task
        if not self._shares:
            return None
        fresh = {self._fresh.get(id(path)) for _, path in self._under_way}
        return next((other for other in self._waiting if other.sharing_key and other.next_points in fresh), None)

    def start(self, task: TaskT, path: PathT) -> None:
        """Begin one of a task's paths."""
        task.request_start.has_begun = True
        self._fresh[id(path)] = task.next_points
        task.samples_left -= 1
        task.samples_under_way += 1
        self._under_way.append((task, path))

    def park(self, path: PathT) -> None:
        """Take a path that waits for others of its task out of the passes; it has not ended."""
        self._under_way = [pair for pair in self._under_way if pair[1] is not path]

    def resume(self, task: TaskT, path: PathT) -> None:
        """Put a parked path back."""
        self._under_way.append((task, path))

    def end(self, task: TaskT, path: PathT) -> None:
        """Remove a path that has its answer or gets none."""
        self.park(path)
        self._fresh.pop(id(path), None)
        task.samples_under_way -= 1
        if task.is_finished:
            self._finished.append(task)

    def late(self) -> list[tuple[TaskT, PathT]]:
        """Paths under way whose deadline is over; their tasks start no more paths, unless they need all."""
        late = [(task, path) for task, path in self._under_way if task.is_late]
        for task, _ in late:
            if not task.needs_all:
                task.samples_left = 0
        return late

    def take_finished(self) -> list[TaskT]:
        """The tasks that have finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def next_chunk(self, equal: bool) -> list[Piece[TaskT, PathT]]:
        """The rows of the next pass.

        Args:
            equal: make chunks of about equal size, for passes that are not padded: 50 rows at 8 a chunk are 7 chunks
                of 7 or 8, not 6 of 8 and one of 2. A piece that costs more than it saves is left out.
        """
        room = self.limit
        groups = self._groups()
        if equal:
            rows_left = sum(task.rows_left for task in self._waiting) + sum(path.rows_left for (_, path), *_ in groups)
            room = math.ceil(rows_left / math.ceil(rows_left / self.limit))
        chunk: list[Piece[TaskT, PathT]] = []
        count = 0
        for (task, path), *companions in groups:
            rows = min(room - count, path.rows_left)
            if rows <= path.overlap or path.shape != self._under_way[0][1].shape:
                break
            if len(companions) != len(groups[0]) - 1:  # each backward pass is over all rows of the chunk
                break
            if equal and chunk and path.overlap and self._adds_a_piece(path, rows):
                break
            chunk.append(Piece(task, path, slice(count, count + rows), tuple(companions)))
            count += rows
            for _, member in chunk[-1].members:
                self._fresh.pop(id(member), None)
        return chunk

    def _groups(self) -> list[list[tuple[TaskT, PathT]]]:
        """Paths under way in order, together with those that share their next rows."""
        if not self._shares:
            return [[pair] for pair in self._under_way]
        groups: dict[Hashable, list[tuple[TaskT, PathT]]] = {}
        for task, path in self._under_way:
            points: Hashable = path.points
            groups.setdefault(id(path) if points is None else points, []).append((task, path))
        return list(groups.values())

    def _adds_a_piece(self, path: PathT, rows: int) -> bool:
        """Whether a path with overlap is cut into more pieces if its next ``rows`` rows are passed by themselves.

        Each further piece takes one more row, which costs more than a smaller pass.
        """
        whole, rest = (math.ceil((path.rows_left - begun) / (self.limit - 1)) for begun in (1, rows))
        return 1 + rest > whole


def halve(chunk: Sequence[Piece[TaskT, PathT]]) -> list[Piece[TaskT, PathT]]:
    """The first half of a chunk's rows; empty if the chunk cannot be halved."""
    room = chunk[-1].rows.stop // 2
    begun = [piece for piece in chunk if piece.rows.start < room]
    half = [replace(piece, rows=slice(piece.rows.start, min(piece.rows.stop, room))) for piece in begun]
    return [piece for piece in half if piece.rows.stop - piece.rows.start > piece.path.overlap]
