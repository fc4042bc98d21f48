"""Nodes placed by a network's calibration, and mean gradients between them."""

import itertools
import json
import math

import captum.attr
import numpy as np
import pytest
import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from classifier_files import Preprocessing
from conftest import relative_distance, scene_pixels, untrained
from error_law import ErrorLaw
from own_networks import Grouped, seeded
from path_density import CalibrationError, PathDensity

from tools.calibrate import LAW_STEPS, fit_law, gradient_change, load_folder
from tools.evaluation.integrals import integrate
from tools.shapes.checkpoint import DEMO_CALIBRATION
from tools.torchscript.mean_slopes import MeanSlopeMaxPool, MeanSlopeRelu, share_gradients
from tools.torchscript.served_classifier import build_served

FLAT = torch.ones(1).double()
LAW = {"scale": 1.0, "order": 1.5, "margin": 1.3}


def flat_density():
    return PathDensity({"logit": FLAT, "probability": FLAT}, {})


@pytest.fixture(scope="module")
def demo_density():
    return PathDensity.load(DEMO_CALIBRATION, json.loads(DEMO_CALIBRATION.read_text())["model_sha256"])


@pytest.fixture(scope="module")
def engine(served_module, demo_density):
    return AttributionEngine(served_module, density=demo_density)


def job(engine, index, n_steps, **options):
    image = scene_pixels(index)
    with torch.no_grad():
        target = int(engine.network(image[None]).argmax())
    return Job(image, torch.zeros_like(image), target, n_steps, "calibrated", **options)


def test_edges_have_equal_density_between_them():
    density = torch.tensor([1.0, 2.0, 0.0, 4.0]).double()  # they add up to 7, without the least density
    edges = PathDensity({"logit": density}, {}).edges("logit", 7)
    quiet = 0.1 * 7 / 4
    densities = torch.tensor([1.0, 2.0, quiet, 4.0]).double()
    fine = torch.linspace(0, 1, 400_001).double()
    shares = [
        densities[(4 * fine[(fine >= left) & (fine < right)]).long().clamp_max(3)].sum().item()
        for left, right in itertools.pairwise(edges.tolist())
    ]
    assert shares == pytest.approx([sum(shares) / 7] * 7, rel=1e-3)
    assert edges[0] == 0
    assert edges[-1] == 1


@pytest.mark.parametrize("n_steps", [1, 2, 3, 50, 1000])
def test_edges_rise_from_0_to_1_for_any_number_of_steps(demo_density, n_steps):
    edges = demo_density.edges("probability", n_steps)
    assert len(edges) == n_steps + 1
    assert (edges.diff() > 0).all()
    assert PathDensity({"logit": torch.zeros(5)}, {}).edges("logit", 2).tolist() == [0, 0.5, 1]


@pytest.mark.slow
def test_twenty_calibrated_steps_come_closer_to_the_integral_than_captums_fifty(engine):
    errors = {"logit": [], "probability": []}
    for index in (0, 1):
        integrals = integrate(engine, job(engine, index, 1).image, job(engine, index, 1).target, 256)
        for output, distances in errors.items():
            calibrated_job = job(engine, index, 20, probability=output == "probability")
            captum_job = Job(
                calibrated_job.image,
                calibrated_job.baseline,
                calibrated_job.target,
                50,
                probability=calibrated_job.probability,
            )
            explanations = engine.explain([calibrated_job, captum_job])
            distances.append(
                [relative_distance(explanation.attributions, integrals[output]) for explanation in explanations]
            )
            assert explanations[0].n_steps == 20
            assert math.isnan(explanations[0].error_estimate)
    for distances in errors.values():
        calibrated, captum_50 = torch.tensor(distances).mean(dim=0)
        assert calibrated < captum_50 < 0.02


@pytest.mark.parametrize("options", [{}, {"probability": True}, {"contrast": 0}], ids=str)
def test_mean_gradients_account_for_the_whole_change_of_the_output(engine, options):
    for n_steps in (1, 4, 15):
        (explanation,) = engine.explain([job(engine, 3, n_steps, **options)])
        assert abs(explanation.convergence_delta) <= 1e-4


def test_chunks_and_neighbours_change_nothing(served_module, demo_density):
    large, small = (AttributionEngine(served_module, max_rows=rows, density=demo_density) for rows in (32, 3))
    jobs = [job(large, 0, 7), job(large, 1, 5, probability=True), job(large, 2, 1)]
    point_jobs = [Job(one.image, one.baseline, one.target, n) for one, n in zip(jobs, (3, 8, 2))]
    mixed = [mixed_job for pair in zip(jobs, point_jobs) for mixed_job in pair]
    alone = [large.explain([mixed_job])[0] for mixed_job in mixed]
    for engine in (large, small):
        for one, expected in zip(engine.explain(mixed), alone):
            assert relative_distance(one.attributions, expected.attributions) <= 1e-5
            assert one.n_steps == expected.n_steps


def test_a_path_is_cut_into_no_more_pieces_than_it_needs(served_module, demo_density):
    engine = AttributionEngine(served_module, max_rows=9, density=demo_density)
    # The 14 ends of 13 segments take two passes, the second of which begins with the last end of the first.
    engine.explain([job(engine, index, 13) for index in range(3)])
    assert engine.rows_passed == 3 * 15
    # A first piece is taken if it does not increase the number of pieces: 8 and 5 segments, 4 and 8.
    engine.chunks_passed.clear()
    engine.explain([job(engine, 0, 3), job(engine, 1, 12)])
    assert engine.chunks_passed == {9: 2}


def test_a_mean_gradient_needs_two_rows_a_pass(served_module, demo_density):
    with pytest.raises(ValueError, match="at least two rows"):
        AttributionEngine(served_module, max_rows=1, density=demo_density).explain([job_of_one(served_module)])


def job_of_one(module):
    return job(AttributionEngine(module), 0, 3)


@pytest.mark.parametrize(
    ("make", "has_mean_slopes"),
    [
        pytest.param(lambda: untrained("mobilenet_v2", 5), True, id="mobilenet_v2", marks=pytest.mark.slow),
        pytest.param(lambda: untrained("squeezenet1_1", 5), True, id="squeezenet1_1"),
        pytest.param(lambda: untrained("mobilenet_v3_small", 5), True, id="mobilenet_v3_small"),
        pytest.param(lambda: seeded(Grouped(5)), False, id="group normalisation"),
    ],
)
def test_discrete_gradients_where_every_operator_has_one(make, has_mean_slopes):
    module = torch.jit.script(build_served(make(), (3, 224, 224)))
    assert hasattr(module, "mean_slope_tail") == has_mean_slopes
    engine = AttributionEngine(module.double(), density=flat_density())
    image = scene_pixels(0).double()
    one = Job(image, torch.zeros_like(image), 2, 6, "calibrated")
    (explanation,) = engine.explain([one])
    if has_mean_slopes:
        assert explanation.convergence_delta.item() == pytest.approx(0, abs=1e-9)
    else:
        # Six even cells are then known by their middles.
        expected = captum.attr.IntegratedGradients(engine.network).attribute(
            image[None], target=2, n_steps=6, method="riemann_middle"
        )
        assert relative_distance(explanation.attributions, expected[0].detach()) <= 1e-6


def test_mean_slopes_of_relu6_and_pooling_equal_those_of_many_points():
    """One cell against 4,000 points, in a network whose activations move on straight lines."""
    torch.manual_seed(0)
    start, end = 8 * torch.randn(2, 1, 3, 9, 9).double()
    for layer in (
        MeanSlopeRelu(),
        MeanSlopeRelu(6.0),
        MeanSlopeMaxPool([2, 2]),
    ):
        ends = torch.cat((start, end)).requires_grad_()
        values = layer(ends, torch.tensor([True, False]))
        torch.testing.assert_close(values, layer(ends, None))
        (mean,) = torch.autograd.grad(values[0].sum(), ends)
        places = (torch.arange(4000).double().view(-1, 1, 1, 1) + 0.5) / 4000
        points = torch.lerp(start, end, places).requires_grad_()
        (at_points,) = torch.autograd.grad(layer(points, None).sum(), points)
        # Where three places lead in turn, pooling uses only the first and the last.
        if not isinstance(layer, MeanSlopeMaxPool):
            torch.testing.assert_close(mean[0], at_points.mean(dim=0), rtol=0, atol=1e-3)
        change = (mean[0] * (end - start)[0]).sum()
        torch.testing.assert_close(change, layer(end, None).sum() - layer(start, None).sum())
        # The last row is not paired: its gradient is that of a point.
        (plain,) = torch.autograd.grad(layer(ends, None)[1].sum(), ends)
        (last,) = torch.autograd.grad(layer(ends, torch.tensor([True, False]))[1].sum(), ends)
        torch.testing.assert_close(last, plain)


def test_calibration_measures_how_the_integrand_changes(engine):
    change = gradient_change(engine, scene_pixels(0), intervals=8)
    for name in ("logit", "probability"):
        assert change[name].shape == (8,)
        assert (change[name] > 0).all()
    assert not torch.allclose(change["logit"], change["probability"])


def test_calibration_finds_the_law_that_errors_follow():
    generator = np.random.default_rng(0)
    scales = generator.uniform(0.5, 2, 200)
    counts = np.array(LAW_STEPS)
    errors = scales[:, None] * counts**-1.3
    stands_for = ErrorLaw(1.0, 1.3, 1.0)
    differences = [{n: scale * n**-1.3 / stands_for.share(n // 4, n) for n in (8, 16, 32)} for scale in scales]
    law = fit_law(errors, differences)
    assert law.order == pytest.approx(1.3)
    assert law.scale == pytest.approx(np.percentile(scales, 90))
    assert law.margin == pytest.approx(1)
    # One image of ten has twice the error for its difference, and the margin covers it.
    for one in differences[::10]:
        one.update({count: difference / 2 for count, difference in one.items()})
    assert fit_law(errors, differences).margin == pytest.approx(2)


def test_calibration_images_that_cannot_be_read_are_named_and_left_out(tmp_path, capsys):
    from conftest import encode, scene_image

    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for index in range(3):
        (tmp_path / f"scene{index}.png").write_bytes(encode(scene_image(index)))
    images = list(load_folder(tmp_path, 2, Preprocessing()))
    assert len(images) == 2
    torch.testing.assert_close(images[0], scene_pixels(0))
    assert "broken.jpg" in capsys.readouterr().err


def calibration_with(density, **law):
    """A calibration with these values for the probability."""
    parts = {
        "density": {"logit": [1], "probability": density},
        "error_law": {"logit": LAW, "probability": {**LAW, **law}},
    }
    return json.dumps({"model_sha256": "1234", **parts})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "this network has no path_density.json; python -m tools.calibrate writes it"),
        ("{", "path_density.json cannot be read"),
        ("[]", "path_density.json cannot be read"),
        ("{}", "path_density.json cannot be read"),
        ('{"model_sha256": "abc"}', "belongs to another network (sha256 abc..., not 1234"),
        ('{"model_sha256": "1234", "density": {"logit": "x"}}', "no valid density or error_law"),
        ('{"model_sha256": "1234", "density": {"logit": [1]}}', "error_law for 'logit'"),
        (calibration_with([1, math.nan]), "for 'probability'"),
        (calibration_with([-1]), "for 'probability'"),
        (calibration_with([]), "for 'probability'"),
        (calibration_with([1, 2], scale=0), "for 'probability'"),
        (calibration_with([1, 2], order="much"), "for 'probability'"),
        (calibration_with([1, 2], margin=math.inf), "for 'probability'"),
        (calibration_with([1, 2], slope=1), "for 'probability'"),
    ],
)
def test_missing_foreign_and_damaged_calibrations_are_named(tmp_path, content, message):
    file = tmp_path / "path_density.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CalibrationError) as error:
        PathDensity.load(file, "1234")
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_mean_slopes_stay_finite_where_nothing_moves(dtype):
    """As on a GPU, where gradients are shared at every place of a pooling, in either precision."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 2, 6, 6).relu().expand(3, 2, 6, 6).to(dtype).contiguous().requires_grad_()
    paired = torch.tensor([True, True, False])
    activated = MeanSlopeRelu()(inputs, paired)
    values, places = torch.nn.functional.max_pool2d_with_indices(activated, 2)
    changes = (places[:-1] != places[1:]).permute(0, 2, 3, 1).reshape(-1)
    shared = share_gradients(activated, values, places, torch.arange(changes.numel()), changes)
    torch.testing.assert_close(shared, values)
    (gradient,) = torch.autograd.grad(shared.sum(), inputs)
    assert gradient.isfinite().all()


def test_every_place_or_only_changed_ones_share_gradients_alike():
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 6, 6).requires_grad_()
    paired = torch.tensor([True, True, False])
    values, places = torch.nn.functional.max_pool2d_with_indices(inputs, 2)
    changes = (places[:-1] != places[1:]).permute(0, 2, 3, 1).reshape(-1)
    assert 0 < changes.sum() < changes.numel()
    everywhere = share_gradients(inputs, values, places, torch.arange(changes.numel()), changes)
    pool = MeanSlopeMaxPool([2, 2])
    weights = torch.randn_like(values)
    (gradients,) = torch.autograd.grad((everywhere * weights).sum(), inputs)
    (expected,) = torch.autograd.grad((pool(inputs, paired) * weights).sum(), inputs)
    torch.testing.assert_close(gradients, expected)
