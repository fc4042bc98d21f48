"""The drop-in against Captum's class: on Captum's toy models, and inside classes that take an attribution method."""

import copy

import captum.attr
import pytest
import torch
from captum.metrics import infidelity, sensitivity_max
from captum.testing.helpers import basic_models as toys
from captum_drop_in import IntegratedGradients

torch.manual_seed(0)
LINEAR_INPUT = torch.randn(4, 3)
CONV_INPUT = 100 * torch.rand(3, 1, 4, 4)

CASES = {
    "integer target": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": 1}),
    "list of targets": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": [0, 1, 1, 0]}),
    "tensor of targets": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": torch.tensor([1, 0, 0, 1])}),
    "tensor of one target": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": torch.tensor(1)}),
    "negative target": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": -1}),
    "tuple of one input": (toys.BasicModel_MultiLayer(), (LINEAR_INPUT,), {"target": 1}),
    "double precision": (toys.BasicModel_MultiLayer().double(), LINEAR_INPUT.double(), {"target": 1}),
    "scalar baseline": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": 1, "baselines": 0.5}),
    "one baseline for all": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": 0, "baselines": torch.ones(1, 3)}),
    "own baselines": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": 0, "baselines": torch.randn(4, 3)}),
    "tuple of baselines": (toys.BasicModel_MultiLayer(), (LINEAR_INPUT,), {"target": 0, "baselines": (0.25,)}),
    "small internal batch": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": 1, "internal_batch_size": 5}),
    "few steps": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": 1, "n_steps": 3}),
    "riemann": (toys.BasicModel_MultiLayer(), LINEAR_INPUT, {"target": 1, "method": "riemann_trapezoid"}),
    "convolution": (toys.BasicModel_ConvNet_One_Conv(), CONV_INPUT, {"target": 3}),
    "no target": (toys.BasicModel(), torch.randn(4, 1), {}),
    "two inputs": (toys.BasicModel2(), (torch.rand(4) + 2, torch.rand(4)), {}),
    "two inputs and baselines": (toys.BasicModel3(), (torch.rand(3) + 2, torch.rand(3)), {"baselines": (0.1, 0)}),
    "several outputs an example": (
        toys.BasicModel_MultiLayer(),
        LINEAR_INPUT,
        {"target": (1, 0, 1), "additional_forward_args": (None, True)},
    ),
    "extra forward arguments": (
        toys.BasicModel_MultiLayer_MultiInput(),
        (LINEAR_INPUT, LINEAR_INPUT + 1, LINEAR_INPUT * 2),
        {"target": 1, "additional_forward_args": 4},
    ),
    "a function": (lambda x: x.square().sum(dim=1), LINEAR_INPUT, {}),
    "a function with targets": (lambda x: x.square(), LINEAR_INPUT, {"target": [0, 1, 2, 0]}),
}


@pytest.mark.parametrize("multiply_by_inputs", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_attribute_returns_what_captum_returns(case, multiply_by_inputs):
    model, inputs, options = CASES[case]
    expected, expected_delta = captum.attr.IntegratedGradients(model, multiply_by_inputs).attribute(
        inputs, return_convergence_delta=True, **options
    )
    engine = IntegratedGradients(model, multiply_by_inputs)
    attributions, delta = engine.attribute(inputs, return_convergence_delta=True, **options)
    torch.testing.assert_close(attributions, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta, expected_delta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(engine.attribute(inputs, **options), expected, rtol=1e-5, atol=1e-5)


def test_which_calls_are_accelerated():
    """Otherwise the comparison above would pass if Captum's code ran everything."""
    accelerated = []
    for name, (model, inputs, options) in CASES.items():
        engine = IntegratedGradients(model)
        explain = engine.engine.explain
        engine.engine.explain = lambda *args, explain=explain, name=name, **kwargs: (
            accelerated.append(name) or explain(*args, **kwargs)
        )
        engine.attribute(inputs, **options)
    assert accelerated == list(CASES)[: list(CASES).index("no target")][:4] + list(CASES)[5:15]


def test_a_hook_sends_the_call_to_captums_code():
    model = toys.BasicModel_MultiLayer()
    seen = []
    model.linear1.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    IntegratedGradients(model).attribute(LINEAR_INPUT, target=1, n_steps=50)
    assert seen == [200]


@pytest.mark.parametrize(
    "options",
    [{"method": "simpson"}, {"n_steps": -1}, {"baselines": torch.zeros(2, 3)}, {"target": [0, 1]}],
    ids=["method", "n_steps", "baseline shape", "too few targets"],
)
def test_wrong_arguments_raise_what_captum_raises(options):
    model = toys.BasicModel_MultiLayer()
    arguments = {"target": 1, **options}
    with pytest.raises(Exception) as captums:  # noqa: PT011, whatever Captum raises
        captum.attr.IntegratedGradients(model).attribute(LINEAR_INPUT, **arguments)
    with pytest.raises(captums.type):
        IntegratedGradients(model).attribute(LINEAR_INPUT, **arguments)


def test_noise_tunnel_and_metrics_take_the_engine():
    model = toys.BasicModel_MultiLayer()
    results = []
    for attribution in (captum.attr.IntegratedGradients(model), IntegratedGradients(model)):
        torch.manual_seed(1)
        smooth = captum.attr.NoiseTunnel(attribution).attribute(LINEAR_INPUT, nt_samples=4, stdevs=0.2, target=1)
        sensitivity = sensitivity_max(attribution.attribute, LINEAR_INPUT, target=1)

        def perturb(inputs):
            noise = 0.1 * torch.randn_like(inputs)
            return noise, inputs - noise

        infidelities = infidelity(model, perturb, LINEAR_INPUT, attribution.attribute(LINEAR_INPUT, target=1), target=1)
        results.append((smooth, sensitivity, infidelities))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_served_file_is_a_drop_in_too(served_module, eager_model_float64):
    # In float64, where rounding flips no activation; the folded weights are rounded to float32, which is 5e-6 here.
    from conftest import relative_distance, scene_pixels

    images = torch.stack([scene_pixels(0), scene_pixels(1)]).double()
    options = {"target": [2, 5], "n_steps": 6, "return_convergence_delta": True}
    attributions, delta = IntegratedGradients(copy.deepcopy(served_module).double()).attribute(images, **options)
    expected, expected_delta = captum.attr.IntegratedGradients(eager_model_float64).attribute(images, **options)
    assert relative_distance(attributions, expected.detach()) <= 5e-5
    torch.testing.assert_close(delta, expected_delta.detach(), rtol=0, atol=1e-5)
