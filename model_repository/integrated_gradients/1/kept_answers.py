"""Answers that are kept for equal requests: their keys, their state, and a store that is bounded by bytes."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

from attribution_job import Explanation, Job, PathState
from integration_path import IntegrationPath
from torch import Tensor

# For the key and the objects of an answer, besides its tensors.
ENTRY_BYTES = 8192


def work_key(job: Job) -> Hashable:
    """Equal for jobs whose gradients may be taken once for all of them; None where they may not.

    It has every parameter that the map depends on, except the deadline, which depends on the time.
    """
    if job.ends_key is None or job.deadline is not None or job.rule is not None:
        return None
    if job.nt_samples > 1 and not job.stdevs:  # the same path several times
        return None
    noise = (job.nt_samples, job.stdevs, job.seed) if job.stdevs else None
    rule = (job.n_steps, job.method, job.tolerance, job.part, job.parts)
    # A mean over baselines has no state, from which another job's logits could make an answer.
    logits = _logits_digest(job) if job.further_baselines else None
    return path_key(job), rule, noise, logits


def is_plain(job: Job) -> bool:
    """Whether it has one path, to the image without noise."""
    return job.paths == 1 and not job.stdevs


def path_key(job: Job) -> Hashable:
    """Equal for jobs that explain the same function along the same path, to any accuracy; None where unknown."""
    return None if job.ends_key is None else (job.ends_key, job.target, job.contrast, job.probability)


def answer_key(job: Job) -> Hashable:
    """Equal for jobs with the same answer.

    A tolerance stops by the completeness gap, for which the request's own logits count. So they are part of the key.
    """
    key = work_key(job)
    if key is None or job.tolerance is None or not is_plain(job):
        return key
    return key, _logits_digest(job)


def _logits_digest(job: Job) -> bytes | None:
    return None if job.image_logits is None else hashlib.sha256(job.image_logits.cpu().numpy().tobytes()).digest()


def answer_from(explanation: Explanation, job: Job) -> Explanation | None:
    """The answer to a job from the explanation of one with an equal ``work_key``; None if it needs more gradients.

    The delta is that of the job's own logits. Whether a tolerance is reached depends on them, too.
    """
    state = explanation.state
    if job.tolerance is not None and is_plain(job):
        return None if state is None else finished(state, job)
    if state is not None and job.image_logits is not None:
        change = job.objective(job.image_logits) - job.objective(state.start_logits)
        delta = explanation.attributions.sum() - explanation.weight_sum * change
        explanation = replace(explanation, convergence_delta=delta)
    return taking_no_time(explanation)


def finished(state: PathState, job: Job) -> Explanation | None:
    """The explanation of a job by the stages that are there; None if it needs more gradients."""
    if job.deadline is not None or job.image_logits is None or not fits(state, job):
        return None
    path = IntegrationPath.resumed(replace(job, state=state))
    return None if path.goes_on(math.inf) else taking_no_time(path.explanation(with_delta=True))


def fits(state: PathState | None, job: Job) -> bool:
    """Whether the stages of a path are no more than a job may spend."""
    return state is not None and state.rule is not None and state.rule.n_steps <= job.n_steps


def taking_no_time(explanation: Explanation) -> Explanation:
    """The same explanation, answered at once."""
    return replace(explanation, started=time.monotonic(), seconds=0.0)


@dataclass(frozen=True, eq=False)
class _Entry:
    value: Explanation
    size: int


class AnswerStore:
    """Explanations by key, in their device's memory. The least recently used go first. Safe to use from any thread.

    Args:
        max_bytes: most bytes of all that is kept; 0 keeps nothing.

    Raises:
        ValueError: it is below 0.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"kept_bytes must be at least 0, not {max_bytes}")
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return self._size

    def get(self, key: Hashable) -> Explanation | None:
        """What is kept under a key."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.value

    def put(self, key: Hashable, explanation: Explanation) -> None:
        """Keep an explanation, unless it is larger than all that may be kept."""
        kept = _without_rest(explanation)
        size = ENTRY_BYTES + held_bytes(kept)
        with self._lock:
            if previous := self._entries.pop(key, None):
                self._size -= previous.size
            if size > self.max_bytes:
                return
            self._entries[key] = _Entry(kept, size)
            self._size += size
            while self._size > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._size -= dropped.size


def held_bytes(value: Any) -> int:
    """Bytes of the memory that the tensors in an object hold."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(value)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _all_tensors(value.values())
    elif isinstance(value, (list, tuple)):
        yield from _all_tensors(value)
    elif isinstance(value, partial):
        yield from _all_tensors(value.args)
    elif is_dataclass(value):
        yield from _all_tensors(getattr(value, field.name) for field in fields(value))
    elif hasattr(value, "__dict__"):
        yield from _all_tensors(vars(value).values())


def _all_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        yield from _tensors(value)


def _without_rest(explanation: Explanation) -> Explanation:
    """The same, without the rest of a larger tensor that its attributions are a part of."""
    attributions = explanation.attributions
    if attributions.untyped_storage().nbytes() > attributions.nbytes:
        attributions = attributions.clone()
    state = explanation.state
    if state is not None and state.attributions is not None:
        is_same = state.attributions is explanation.attributions
        state = replace(state, attributions=attributions if is_same else state.attributions.clone())
    return replace(explanation, attributions=attributions, state=state)
