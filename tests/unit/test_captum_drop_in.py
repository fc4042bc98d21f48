"""The drop-in against Captum's class: on Captum's toy models, and inside classes that take an attribution method."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import captum.attr
import classifier_network
import pytest
import torch
from captum._utils.gradient import compute_gradients
from captum.metrics import infidelity, sensitivity_max
from captum.testing.helpers import basic_models as toys
from captum_drop_in import IntegratedGradients
from drop_in_cases import (
    DEPENDENT,
    INDEPENDENT,
    Scores,
    TwoInputs,
    accelerated_calls,
    assert_answers_as_captum,
    assert_same,
    build,
    outcome,
)
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

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
        with accelerated_calls() as calls:
            IntegratedGradients(copy.deepcopy(model).eval() if isinstance(model, nn.Module) else model).attribute(
                inputs, **options
            )
        accelerated += [name] if calls else []
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
    options = {"target": [2, 5], "n_steps": 3, "return_convergence_delta": True}
    attributions, delta = IntegratedGradients(copy.deepcopy(served_module).double()).attribute(images, **options)
    expected, expected_delta = captum.attr.IntegratedGradients(eager_model_float64).attribute(images, **options)
    assert relative_distance(attributions, expected.detach()) <= 5e-5
    torch.testing.assert_close(delta, expected_delta.detach(), rtol=0, atol=1e-5)


ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", [*INDEPENDENT, *DEPENDENT])
def test_modules_are_accelerated_only_if_their_rows_are_independent(name):
    with accelerated_calls() as calls:
        assert_answers_as_captum(build(name), ROWS, {"target": 1, "return_convergence_delta": True, "n_steps": 12})
    assert bool(calls) == (name in INDEPENDENT)


def test_an_image_of_zeros_hides_no_dependence():
    module = build("a threshold on the largest")
    ours, captums = IntegratedGradients(module), captum.attr.IntegratedGradients(module)
    for rows in (torch.zeros(1, 3), 1e-3 * ROWS, 30 * ROWS):
        assert_same(*(outcome(each, rows, {"target": 1, "n_steps": 6}) for each in (ours, captums)))


def test_what_the_first_call_does_not_show_is_found_before_it_matters():
    """Activations that are all off near the first image; and a threshold that only later images reach."""
    for threshold in (2, 1e4):
        for seed in range(6):
            module = build("a threshold on the largest", seed)
            module.before = lambda rows, threshold=threshold: torch.where(rows.max() > threshold, rows, rows.sin())
            ours, captums = IntegratedGradients(module, max_rows=2), captum.attr.IntegratedGradients(module)
            for rows in (ROWS[:1], ROWS, threshold * ROWS):
                assert_same(*(outcome(each, rows, {"target": 1, "n_steps": 6}) for each in (ours, captums)))


OPTIONS = {
    "list of one target for four rows": {"target": [1]},
    "target True": {"target": True},
    "targets True": {"target": [True, False, True, True]},
    "uint8 targets": {"target": torch.tensor([1, 0, 2, 3], dtype=torch.uint8)},
    "int32 targets": {"target": torch.tensor([1, 0, 2, 3], dtype=torch.int32)},
    "float target": {"target": torch.tensor(1.0)},
    "tensor of one target in two dimensions": {"target": torch.tensor([[1]])},
    "tensor of targets in two dimensions": {"target": torch.tensor([[1], [0], [2], [3]])},
    "target too large": {"target": 4},
    "targets too large": {"target": [0, 1, 2, 4]},
    "no target": {"target": None},
    "tuples of targets": {"target": [(1,), (2,), (0,), (3,)]},
    "float steps": {"n_steps": 2.0},
    "float steps, list of targets": {"n_steps": 2.0, "target": [0, 1, 2, 3]},
    "no steps": {"n_steps": 0},
    "one step": {"n_steps": 1},
    "one Riemann step": {"n_steps": 1, "method": "riemann_left"},
    "True steps": {"n_steps": True},
    "internal batch of -1": {"internal_batch_size": -1},
    "internal batch of 0": {"internal_batch_size": 0},
    "internal batch of 3": {"internal_batch_size": 3},
    "internal batch of 4": {"internal_batch_size": 4},
    "internal batch of 4.0": {"internal_batch_size": 4.0},
    "internal batch of 300": {"internal_batch_size": 300},
    "unknown method": {"method": "simpson"},
    "baseline of another width": {"baselines": torch.ones(4, 3, dtype=torch.float64)},
    "integer baseline": {"baselines": torch.ones(4, 3, dtype=torch.int64)},
    "baseline True": {"baselines": True},
    "baseline of one number": {"baselines": torch.ones(1, 1)},
    "infinite baseline": {"baselines": float("inf")},
    "baseline with gradients": {"baselines": torch.ones(4, 3, requires_grad=True)},
    "text": {"baselines": "zero"},
    "empty extra arguments": {"additional_forward_args": ()},
    "unknown extra argument": {"additional_forward_args": 3},
}


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_unusual_arguments_do_what_they_do_in_captum(name, multiply):
    for options in (OPTIONS[name], {**OPTIONS[name], "return_convergence_delta": True}):
        assert_answers_as_captum(build("two layers"), ROWS, {"target": 1, "n_steps": 6, **options}, multiply)


INPUTS = {
    "with gradients": ROWS.clone().requires_grad_(),
    "computed from what has gradients": 2 * ROWS.clone().requires_grad_(),
    "a parameter": nn.Parameter(ROWS),
    "a tuple": (ROWS,),
    "a list": [ROWS],
    "no rows": ROWS[:0],
    "one row": ROWS[:1],
    "not a number": ROWS.where(ROWS < 1, torch.nan),
    "float64": ROWS.double(),
    "float16": ROWS.half(),
    "integers": ROWS.long(),
    "sparse": ROWS.to_sparse(),
    "not contiguous": ROWS.t().contiguous().t(),
    "expanded": ROWS[:1].expand(4, 3),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("options", [{}, {"internal_batch_size": 8}, {"return_convergence_delta": True}], ids=str)
def test_unusual_inputs_do_what_they_do_in_captum(name, options):
    assert_answers_as_captum(build("two layers"), INPUTS[name], {"target": 1, "n_steps": 6, **options})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_what_captum_gives(dtype):
    module = build("two layers").to(dtype)
    for inputs in (ROWS.to(dtype), ROWS):
        assert_answers_as_captum(module, inputs, {"target": 1, "return_convergence_delta": True})


@pytest.mark.parametrize("inputs", [(ROWS, ROWS + 1), (ROWS,), ROWS], ids=["two", "one in a tuple", "one"])
@pytest.mark.parametrize("extra", [None, (None, 2.0), (ROWS,)], ids=["none", "two extra", "one extra"])
def test_scripted_modules_take_several_inputs_and_extra_arguments(inputs, extra):
    module = torch.jit.script(TwoInputs().eval())
    assert_answers_as_captum(module, inputs, {"target": 1, "n_steps": 6, "additional_forward_args": extra})


class Passing(TorchDispatchMode):
    """Changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu"), lambda: torch.device("cpu"), Passing],
    ids=["inference mode", "no gradients", "autocast", "a default device", "a dispatch mode"],
)
def test_contexts_do_what_they_do_in_captum_and_leave_nothing(context):
    module, inputs = build("two layers"), ROWS.clone().requires_grad_()
    ours, captums = IntegratedGradients(module), captum.attr.IntegratedGradients(module)
    for _ in range(2):
        with context():
            own = ROWS.clone()
            answers = [[outcome(each, rows, {"target": 1}) for rows in (ROWS, inputs, own)] for each in (ours, captums)]
        assert_same(*answers)
        with accelerated_calls() as calls:
            assert_same(*(outcome(each, ROWS, {"target": 1}) for each in (ours, captums)))
        assert calls == [4]
        assert_same(*(outcome(each, own, {"target": 1}) for each in (ours, captums)))


def scale_in_place(module):
    with torch.no_grad():
        module.first.weight.mul_(3)


def scale_data(module):
    module.first.weight.data.mul_(3)


def replace_weight(module):
    module.first.weight = nn.Parameter(3 * module.first.weight.detach())


def load_state(module):
    module.load_state_dict({name: 3 * weight for name, weight in module.state_dict().items()})


def replace_layer(module):
    module.first = nn.Sequential(nn.Linear(3, 6), nn.Tanh())


def replace_forward(module):
    module.forward = lambda rows: module.last((rows - rows.mean(0)) @ module.first.weight.t())


def train(module):
    module.train()
    module.last.register_forward_pre_hook(lambda layer, rows: (2 * rows[0],))


CHANGES = [scale_in_place, scale_data, replace_weight, load_state, replace_layer, replace_forward, train]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_after_the_first_call_is_seen(change):
    module = build("two layers")
    ours, captums = IntegratedGradients(module), captum.attr.IntegratedGradients(module)
    assert_same(*(outcome(each, ROWS, {"target": 1}) for each in (ours, captums)))
    torch.manual_seed(0)
    change(module)
    assert_same(*(outcome(each, ROWS, {"target": 1}) for each in (ours, captums)))


def test_a_flag_that_is_set_after_the_first_call_is_seen():
    class Flagged(Scores):
        centred = False

        def forward(self, rows):
            return super().forward(rows - rows.mean(0) if self.centred else rows)

    for module in (Flagged().eval(), torch.jit.script(FlaggedScript().eval())):
        ours, captums = IntegratedGradients(module), captum.attr.IntegratedGradients(module)
        for flag in (False, True):
            module.centred = flag
            assert_same(*(outcome(each, ROWS, {"target": 1}) for each in (ours, captums)))


class FlaggedScript(Scores):
    centred: bool

    def __init__(self):
        super().__init__()
        self.centred = False

    def forward(self, rows):
        if self.centred:
            rows = rows - rows.mean(0)
        return self.last(self.first(rows).relu())


def test_a_function_that_is_replaced_is_the_one_explained():
    ours, captums = (cls(build("two layers")) for cls in (IntegratedGradients, captum.attr.IntegratedGradients))
    outcome(ours, ROWS, {"target": 1})
    for other in (build("convolutions"), build("centred rows"), lambda rows: rows.square()):
        ours.forward_func = captums.forward_func = other
        assert_same(*(outcome(each, ROWS, {"target": 1}) for each in (ours, captums)))
        assert ours.forward_func is other

    def doubled(**arguments):
        return tuple(2 * each for each in compute_gradients(**arguments))

    ours.forward_func = captums.forward_func = build("two layers")
    ours.gradient_func = captums.gradient_func = doubled
    assert_same(*(outcome(each, ROWS, {"target": 1}) for each in (ours, captums)))
    ours._multiply_by_inputs = captums._multiply_by_inputs = False
    assert_same(*(outcome(each, ROWS, {"target": 1}) for each in (ours, captums)))


def test_a_probe_leaves_no_trace():
    """The module is not run by it, and no random number is drawn."""
    for name in ("rows remembered", "calls counted", "dropout in evaluation"):
        module, other = build(name), build(name)
        torch.manual_seed(1)
        attributions = IntegratedGradients(module).attribute(ROWS, target=1)
        after = torch.rand(1)
        torch.manual_seed(1)
        torch.testing.assert_close(attributions, captum.attr.IntegratedGradients(other).attribute(ROWS, target=1))
        assert after == torch.rand(1)
        assert getattr(module, "seen", None) == getattr(other, "seen", None)
        assert getattr(module, "calls", None) == getattr(other, "calls", None)


@pytest.mark.parametrize("is_threaded", [False, True])
def test_a_module_may_explain_inside_its_forward(is_threaded):
    class Explaining(Scores):
        explainer = None
        is_inside = False

        def explain(self, rows):
            self.inner = self.explainer.attribute(rows.detach(), target=1, n_steps=4)

        def forward(self, rows):
            if self.explainer is not None and not self.is_inside:
                self.is_inside = True
                if is_threaded:
                    with ThreadPoolExecutor(1) as pool:
                        pool.submit(self.explain, rows).result(timeout=60)
                else:
                    self.explain(rows)
                self.is_inside = False
            return super().forward(rows)

    answers = []
    for cls in (IntegratedGradients, captum.attr.IntegratedGradients):
        torch.manual_seed(0)
        module = Explaining().eval()
        module.explainer = cls(module)
        answers.append(module.explainer.attribute(ROWS, target=1))
    assert_same(*answers)


def test_threads_share_one_object():
    module = build("two layers")
    ours, rows = IntegratedGradients(module), torch.randn(12, 4, 3)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda each: ours.attribute(each, target=1), rows))
    assert_same(answers, [captum.attr.IntegratedGradients(module).attribute(each, target=1) for each in rows])


def test_copies_and_pickles_explain_as_the_original():
    ours = IntegratedGradients(build("two layers"), max_rows=5)
    expected = ours.attribute(ROWS, target=1)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    )
    for each in copies:
        assert type(each) is IntegratedGradients
        assert each.max_rows == 5
        assert_same(each.attribute(ROWS, target=1), expected)
    assert copies[0].forward_func is not ours.forward_func


def test_global_hooks_send_calls_to_captums_code():
    module, seen = build("two layers"), []
    handle = register_module_forward_hook(lambda part, inputs, output: seen.append(len(output)))
    try:
        IntegratedGradients(module).attribute(ROWS, target=1, n_steps=10)
    finally:
        handle.remove()
    assert seen == [40, 40, 40]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_the_nodes_as_in_captum(dtype):
    module, rows = build("softmax").double(), ROWS.double()
    ours, captums = IntegratedGradients(module), captum.attr.IntegratedGradients(module)
    for method in ("riemann_trapezoid", "gausslegendre"):
        options = {"target": 1, "n_steps": 7, "method": method}
        for default in (dtype, torch.float32, dtype):
            before = torch.get_default_dtype()
            torch.set_default_dtype(default)
            try:
                answers = [outcome(each, rows, options) for each in (ours, captums)]
            finally:
                torch.set_default_dtype(before)
            assert_same(*answers, tolerance=1e-13)


def test_exported_files_are_hoisted_and_everything_else_is_not(served_module):
    seen = []
    hoists = classifier_network.Network.__init__

    def note(network, *args, **options):
        hoists(network, *args, **options)
        seen.append(network.hoists)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_network.Network, "__init__", note)
        for module in (build("a part called stem and one called tail"), build("scripted, with parts of these names")):
            IntegratedGradients(module).attribute(ROWS, target=1, n_steps=2)
        IntegratedGradients(served_module).attribute(torch.rand(1, 3, 64, 64), target=1, n_steps=2)
        file = io.BytesIO()
        torch.jit.save(served_module, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        IntegratedGradients(loaded).attribute(torch.rand(1, 3, 64, 64), target=1, n_steps=2)
    assert seen == [False, False, True, True]


def test_weights_of_an_exported_file_may_change(served_module):
    module, images = copy.deepcopy(served_module), torch.rand(1, 3, 64, 64)
    ours = IntegratedGradients(module)
    ours.attribute(images, target=1, n_steps=3)
    for weight in module.stem_layers.parameters():
        weight.data.mul_(4)
    captums = captum.attr.IntegratedGradients(lambda rows: module(rows)[0])
    answers = [each.attribute(images, target=1, n_steps=3) for each in (ours, captums)]
    # float32 in another order: one flipped activation of the thousands.
    assert (answers[0] - answers[1]).norm() <= 0.02 * answers[1].norm()


def test_no_rows_a_pass_are_refused():
    with pytest.raises(ValueError, match="max_rows must be at least 1, not 0"):
        IntegratedGradients(build("two layers"), max_rows=0)
