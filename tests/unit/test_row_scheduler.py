"""The order of rows, on artificial paths without tensors or a network."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass

import pytest
from request_admission import Admission, OverloadedError, RequestStart
from row_scheduler import (
    CANCELLATION_CHECK_SECONDS,
    FAIRNESS_FACTOR,
    URGENT_SECONDS,
    RowScheduler,
    Task,
    halve,
)


@dataclass(eq=False)
class MadeUpPath:
    rows_left: int
    overlap: int = 0
    shape: str = "square"
    points: Hashable = None


@pytest.fixture
def now(monkeypatch):
    """The seconds of a clock that changes only when it is set."""
    time = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    return time


def under_way(limit: int, *paths: MadeUpPath, **options) -> RowScheduler[Task, MadeUpPath]:
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(limit)
    for path in paths:
        task = Task(path.rows_left, 0, **options)
        scheduler.add(task)
        scheduler.start(task, path)
    return scheduler


def pass_all(scheduler: RowScheduler[Task, MadeUpPath], equal: bool = True) -> list[int]:
    """Rows of each pass until all tasks are done."""
    rows = []
    while scheduler.has_rows:
        chunk = scheduler.next_chunk(equal)
        rows.append(chunk[-1].rows.stop)
        for piece in chunk:
            taken = piece.rows.stop - piece.rows.start - piece.path.overlap
            piece.path.rows_left -= taken
            if piece.path.rows_left <= piece.path.overlap:
                scheduler.end(piece.task, piece.path)
    return rows


def test_chunks_are_of_equal_size_where_passes_are_not_padded():
    assert pass_all(under_way(8, MadeUpPath(50))) == [8, 7, 7, 7, 7, 7, 7]
    assert pass_all(under_way(8, MadeUpPath(50)), equal=False) == [8] * 6 + [2]


def test_paths_share_a_chunk_and_their_places_adjoin():
    scheduler = under_way(8, MadeUpPath(3), MadeUpPath(4), MadeUpPath(9))
    chunk = scheduler.next_chunk(equal=False)
    assert [(piece.rows.start, piece.rows.stop) for piece in chunk] == [(0, 3), (3, 7), (7, 8)]


def test_paths_of_another_shape_wait_for_a_chunk_of_their_own():
    scheduler = under_way(8, MadeUpPath(3), MadeUpPath(2, shape="wide"), MadeUpPath(3))
    assert len(scheduler.next_chunk(equal=False)) == 1
    assert pass_all(scheduler, equal=False) == [3, 2, 3]


def test_a_piece_of_a_path_with_overlap_has_at_least_two_rows():
    scheduler = under_way(8, MadeUpPath(7), MadeUpPath(9, overlap=1))
    assert [piece.rows for piece in scheduler.next_chunk(equal=False)] == [slice(0, 7)]


def test_a_path_with_overlap_is_not_cut_into_more_pieces_than_it_takes_alone():
    # Alone, 15 rows are two pieces of 8, the second of which begins with the last row of the first.
    scheduler = under_way(8, MadeUpPath(4), MadeUpPath(15, overlap=1))
    pieces = 0
    while scheduler.has_rows:
        for piece in scheduler.next_chunk(equal=True):
            pieces += piece.path.overlap
            piece.path.rows_left -= piece.rows.stop - piece.rows.start - piece.path.overlap
            if piece.path.rows_left <= piece.path.overlap:
                scheduler.end(piece.task, piece.path)
    assert pieces == 2


def test_half_a_chunk_ends_where_its_rows_do():
    chunk = under_way(8, MadeUpPath(3), MadeUpPath(5)).next_chunk(equal=False)
    assert [piece.rows for piece in halve(chunk)] == [slice(0, 3), slice(3, 4)]
    assert halve(under_way(8, MadeUpPath(1)).next_chunk(equal=False)) == []
    assert halve(under_way(8, MadeUpPath(3, overlap=1)).next_chunk(equal=False)) == []


def test_short_tasks_overtake_long_ones_until_those_have_their_turn():
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(8)
    long = Task(30, rows_before=0)
    scheduler.add(long)
    short = Task(5, rows_before=FAIRNESS_FACTOR * 30 - FAIRNESS_FACTOR * 5 - 1)
    scheduler.add(short)
    assert scheduler.next_to_start() is short
    late = Task(5, rows_before=FAIRNESS_FACTOR * 30 - FAIRNESS_FACTOR * 5 + 1)
    scheduler.start(short, MadeUpPath(0))
    scheduler.add(late)
    assert scheduler.next_to_start() is long


def test_a_task_that_takes_more_than_expected_falls_back():
    task, later = Task(5, 0), Task(6, 0)
    assert task.priority < later.priority
    task.rows_spent = 7
    assert task.priority > later.priority


def test_a_near_deadline_goes_before_all_others_and_a_far_one_does_not(now):
    far, short = Task(20, 0, deadline=now[0] + URGENT_SECONDS + 1), Task(5, 0)
    assert short.priority < far.priority
    now[0] += 2
    assert far.priority < short.priority


def test_paths_are_started_late_and_are_few():
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(8)
    task = Task(400, 0, samples_left=40)
    scheduler.add(task)
    started = 0
    while scheduler.next_to_start() is task:
        scheduler.start(task, MadeUpPath(5))
        started += 1
    assert started == 2  # whose 10 rows fill a chunk of 8


def test_paths_that_urgent_ones_overtake_are_bounded(now):
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(4)
    started = 0
    for _ in range(100):
        task = Task(1, 0, deadline=now[0] + 1)
        scheduler.add(task)
        while scheduler.next_to_start() is task:
            scheduler.start(task, MadeUpPath(0))
            started += 1
    assert started == 16


def test_rows_of_what_waits_and_of_what_is_under_way_go_before():
    scheduler = under_way(8, MadeUpPath(10))
    scheduler.add(Task(20, 0))
    scheduler.add(Task(100, 0))
    assert scheduler.rows_before(Task(50, 0).priority) == 30


def test_a_task_that_has_not_started_in_time_is_given_up(now):
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(8)
    task = Task(5, 0, request_start=RequestStart(now[0] + 1))
    scheduler.add(task)
    assert scheduler.drop_given_up() == []
    now[0] += 1
    assert scheduler.drop_given_up() == [task]
    assert scheduler.is_idle


def test_a_started_task_is_not_given_up_for_its_wait(now):
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(8)
    task = Task(5, 0, request_start=RequestStart(now[0] + 1))
    scheduler.add(task)
    scheduler.start(task, MadeUpPath(5))
    now[0] += 10
    assert scheduler.drop_given_up() == []


def test_tasks_of_a_request_that_has_begun_are_not_given_up_for_their_wait(now):
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(8)
    begun, other = RequestStart(now[0] + 1), RequestStart(now[0] + 1)
    first, second, strange = (Task(5, 0, request_start=start) for start in (begun, begun, other))
    for task in (first, second, strange):
        scheduler.add(task)
    scheduler.start(first, MadeUpPath(5))
    now[0] += 10
    assert scheduler.drop_given_up() == [strange]
    assert scheduler.next_to_start() is second


def test_all_are_asked_at_intervals_whether_they_are_cancelled(now):
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(2)
    asked: set[int] = set()
    for number in range(10):
        scheduler.add(Task(5, number, is_cancelled=lambda number=number: bool(asked.add(number))))
    scheduler.drop_given_up()
    assert asked == {0, 1}
    now[0] += CANCELLATION_CHECK_SECONDS
    scheduler.drop_given_up()
    assert asked == set(range(10))


def test_late_tasks_start_no_more_paths(now):
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(8)
    task = Task(50, 0, samples_left=5, deadline=now[0] + 1)
    scheduler.add(task)
    path = MadeUpPath(5)
    scheduler.start(task, path)
    assert scheduler.late() == []
    now[0] += 1
    assert scheduler.late() == [(task, path)]
    scheduler.end(task, path)
    assert scheduler.take_finished() == [task]
    assert scheduler.take_finished() == []
    assert scheduler.is_idle


@pytest.mark.parametrize("equal", [True, False])
def test_every_row_of_every_path_is_taken_once(equal):
    for sizes in itertools.product((1, 7, 8, 9, 50), repeat=2):
        taken = pass_all(under_way(8, *(MadeUpPath(size) for size in sizes)), equal)
        assert sum(taken) == sum(sizes)
        assert max(taken) <= 8


def test_a_request_alone_is_admitted_however_many_images_it_has():
    Admission(5, 10).check(jobs=32, rows=50, waiting=0, wait_seconds=0)


@pytest.mark.parametrize(
    ("waiting", "wait_seconds", "message"),
    [(9, 0, "9 images wait for their gradients, and at most 10 may"), (1, 6, "take about 6.0 s, and at most 5 s")],
)
def test_more_than_may_wait_is_rejected_and_says_so(waiting, wait_seconds, message):
    with pytest.raises(OverloadedError, match=message):
        Admission(5, 10).check(2, 50, waiting, wait_seconds)
    Admission(5, 10).check(2, 50, waiting - 1, wait_seconds - 1)


def test_the_scheduler_starts_with_a_path_those_that_can_share_its_rows():
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(8, shares=True)
    tasks = [Task(20, 0, sharing_key=key) for key in ("a", "b", "a", None)]
    for task in tasks:
        scheduler.add(task)
    started = []
    while (task := scheduler.next_to_start()) is not None:
        scheduler.start(task, MadeUpPath(20, points=task.sharing_key))
        started.append(tasks.index(task))
    assert started == [0, 2]
    (piece,) = scheduler.next_chunk(equal=True)
    assert piece.rows == slice(0, 8)
    assert [task for task, _ in piece.members] == [tasks[0], tasks[2]]


def test_paths_that_wait_for_others_of_their_task_count_as_begun():
    """Their tensors stay. A path is started all the same where no other would have a row."""
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(2)
    tasks = [Task(4, 0, 2) for _ in range(6)]
    parked = [MadeUpPath(2) for _ in range(4)]
    for task, path in zip(tasks, parked):
        scheduler.add(task)
        scheduler.start(task, path)
        scheduler.park(path)
    assert scheduler.next_to_start() is tasks[0]
    scheduler.start(tasks[0], MadeUpPath(1))
    for task in tasks[4:]:
        scheduler.add(task)
    assert scheduler.next_to_start() is None
    scheduler.end(tasks[1], parked[1])
    scheduler.end(tasks[2], parked[2])
    assert scheduler.next_to_start() is not None


def test_a_task_of_many_paths_starts_them_with_those_of_its_partners_and_not_ahead_of_them():
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(4, shares=True)
    tasks = [Task(24, 0, 3, sharing_key="image") for _ in range(2)]
    for task in tasks:
        scheduler.add(task)
    started = []
    for number in range(3):
        paths = []
        while (task := scheduler.next_to_start()) is not None:
            started.append((tasks.index(task), number))
            path = MadeUpPath(4, points=number)
            paths.append((task, path))
            scheduler.start(task, path)
        (piece,) = scheduler.next_chunk(True)
        assert len(piece.members) == 2
        for task, path in paths:
            scheduler.end(task, path)
    assert started == [(task, number) for number in range(3) for task in range(2)]


def test_a_partner_that_comes_after_the_first_rows_waits_its_turn():
    scheduler: RowScheduler[Task, MadeUpPath] = RowScheduler(4, shares=True)
    first, later = (Task(8, 0, sharing_key="image") for _ in range(2))
    scheduler.add(first)
    scheduler.start(first, MadeUpPath(8, points="first"))
    scheduler.next_chunk(True)
    scheduler.add(later)
    assert scheduler.next_to_start() is None
