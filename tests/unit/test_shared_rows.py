"""Several classes of one image share forward passes, and each answers as it does alone."""

from dataclasses import replace

import pytest
import torch
from attribution_engine import AttributionEngine
from conftest import small_job


def classes_of_one_image(n_steps=20, classes=(0, 3, 7), **options):
    job = small_job(n_steps, ends_key="image and zeros", baseline_key="zero", **options)
    return [replace(job, target=target) for target in classes]


def forward_passes(engine):
    """Counts the rows of forward passes from now on."""
    rows = []
    original = engine.network.shared_gradients

    def counting(objectives, *rest):
        rows.append(len(objectives[0].signs))
        return original(objectives, *rest)

    engine.network.shared_gradients = counting
    return rows


@pytest.mark.parametrize(
    "options",
    [{}, {"probability": True}, {"contrast": 1}, {"method": "riemann_trapezoid"}, {"tolerance": 0.1, "n_steps": 60}],
    ids=str,
)
def test_classes_of_one_image_share_forward_passes_and_answer_as_alone(engine, options):
    jobs = classes_of_one_image(**options)
    alone = [engine.explain([job])[0] for job in jobs]
    rows, before = forward_passes(engine), engine.rows_passed
    together = engine.explain(jobs)
    for one, other in zip(alone, together):
        assert torch.equal(one.attributions, other.attributions)
        assert torch.equal(one.convergence_delta, other.convergence_delta)
        assert one.n_steps == other.n_steps
    assert engine.rows_passed - before == sum(rows) + engine.rows_shared
    if "tolerance" not in options:
        assert sum(rows) == 20
    assert engine.rows_shared > 0


@pytest.mark.parametrize("options", [{"n_steps": 2}, {"n_steps": 30}, {"n_steps": 30, "tolerance": 0.1}], ids=str)
def test_classes_share_the_rows_of_each_baseline_of_a_mean(engine, options):
    """And not those of another baseline, even if all begin at once."""
    white = torch.ones_like(small_job(4).image)
    jobs = classes_of_one_image(further_baselines=[(white, "white")], **options)
    jobs = [replace(job, ends_key=0) for job in jobs]  # any key but None
    alone = [engine.explain([job])[0] for job in jobs]
    before, shared = engine.rows_passed, engine.rows_shared
    together = engine.explain(jobs)
    for one, other in zip(alone, together):
        torch.testing.assert_close(other.attributions, one.attributions, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.convergence_delta, one.convergence_delta, rtol=1e-4, atol=1e-5)
        assert one.n_steps == other.n_steps
    if "tolerance" not in options:
        assert engine.rows_passed - before - (engine.rows_shared - shared) == 2 * options["n_steps"]
    assert engine.rows_shared > shared


@pytest.mark.parametrize(
    "change",
    [
        {"ends_key": "another image"},
        {"ends_key": None},
        {"n_steps": 21},
        {"method": "riemann_middle"},
        {"nt_samples": 2, "stdevs": 0.1},
    ],
    ids=str,
)
def test_unlike_paths_share_no_rows(engine, change):
    one, other, _ = classes_of_one_image()
    engine.explain([one, replace(other, **change)])
    assert engine.rows_shared == 0


def test_two_images_of_three_classes_share_chunks(served_module):
    engine = AttributionEngine(served_module, max_rows=8)
    second = small_job(4, seed=1, ends_key="another image")
    jobs = [*classes_of_one_image(4), *(replace(second, target=target) for target in (0, 3, 7))]
    together = engine.explain(jobs)
    assert dict(engine.chunks_passed) == {8: 1}
    for job, explanation in zip(jobs, together):
        (alone,) = engine.explain([job])
        torch.testing.assert_close(explanation.attributions, alone.attributions, rtol=1e-4, atol=1e-6)


def test_a_cancelled_class_leaves_the_others_whole(engine):
    polls = iter([False, False, True])
    first, second, third = classes_of_one_image()
    second = replace(second, is_cancelled=lambda: next(polls, True))
    kept, dropped, other = engine.explain([first, second, third])
    assert dropped is None
    assert engine.rows_shared > 0
    for job, explanation in ((first, kept), (third, other)):
        assert torch.equal(explanation.attributions, engine.explain([job])[0].attributions)


def test_without_memory_for_a_further_backward_pass_the_classes_go_on_alone(engine, monkeypatch):
    jobs = classes_of_one_image()
    alone = [engine.explain([job])[0] for job in jobs]
    original = engine.passes.shared_gradients

    def failing(*arguments):
        gradients = original(*arguments)
        yield next(gradients)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.passes, "shared_gradients", failing)
    for one, other in zip(alone, engine.explain(jobs)):
        torch.testing.assert_close(other.attributions, one.attributions, rtol=1e-4, atol=1e-6)
    assert engine.rows_shared == 0


def test_a_class_that_is_behind_shares_no_rows_with_those_ahead(served_module, monkeypatch):
    """After a chunk without memory for it, its next points are others of the same path."""
    engine = AttributionEngine(served_module, max_rows=8)
    jobs = classes_of_one_image()
    alone = [engine.explain([job])[0] for job in jobs]
    original, failures = engine.passes.shared_gradients, iter([True])

    def failing_once(*arguments):
        gradients = original(*arguments)
        yield next(gradients)
        if next(failures, False):
            raise torch.OutOfMemoryError
        yield from gradients

    monkeypatch.setattr(engine.passes, "shared_gradients", failing_once)
    for one, other in zip(alone, engine.explain(jobs)):
        torch.testing.assert_close(other.attributions, one.attributions, rtol=1e-4, atol=1e-6)


def test_an_image_of_several_classes_and_one_of_a_single_class_have_chunks_of_their_own(served_module):
    engine = AttributionEngine(served_module, max_rows=8)
    jobs = [*classes_of_one_image(4), small_job(4, seed=1, ends_key="another image")]
    together = engine.explain(jobs)
    for job, explanation in zip(jobs, together):
        (alone,) = engine.explain([job])
        torch.testing.assert_close(explanation.attributions, alone.attributions, rtol=1e-4, atol=1e-6)
