"""Discrete gradients of networks and of single operators, against DeepLIFT, the exact change, and many points.

Not tested here: float16 and CUDA devices, where every place of a pooling takes part.
"""

from __future__ import annotations

from collections.abc import Callable

import captum.attr
import pytest
import torch
from torch import Tensor, nn

from tools.torchscript.discrete_gradients import add_discrete_gradients
from tools.torchscript.exported_graph import trace
from tools.torchscript.mean_products import MeanLayerNorm, MeanSoftmax
from tools.torchscript.mean_slopes import MeanSlopeFunction, MeanSlopeMaxPool, MeanSlopeRelu
from tools.torchscript.served_classifier import build_served

PAIR = torch.tensor([True, False])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(module: nn.Module) -> nn.Module:
    """Float64, in evaluation mode, with weights and statistics that are anything but neutral."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2.0, generator=generator)
    return module.double().eval()


class Residual(nn.Module):
    """The branches, sums and joins of the networks that are served, with one ReLU for three places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.relu6 = nn.ReLU6()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.average = nn.AdaptiveAvgPool2d(2)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(8 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        one = self.relu(self.norm(self.first(images)))
        two = self.relu(self.second(one)) + one
        two = self.pool(self.pad(self.relu6(two)))
        joined = torch.cat((self.average(two), nn.functional.adaptive_avg_pool2d(one, 2)), dim=1)
        return self.last(self.dropout(torch.flatten(self.relu(joined), 1)))


def with_discrete_gradients(module: nn.Module) -> torch.fx.GraphModule:
    network = trace(module, (3, 8, 8))
    assert add_discrete_gradients(network) == ""
    return network


def mean_gradient(network: Callable[[Tensor, Tensor], Tensor], ends: Tensor, target: int) -> Tensor:
    """The gradient of the first of two points, as a mean over the segment to the second."""
    ends = ends.clone().requires_grad_()
    return torch.autograd.grad(network(ends, PAIR)[0, target], ends)[0][0]


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already", "ignore:Setting forward, backward hooks")
def test_one_step_of_a_relu_network_is_deeplifts_rescale_rule() -> None:
    module = seeded(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU()
        ).append(nn.Linear(8, 5))
    )
    image, baseline = random(1, 3, 8, 8), random(1, 3, 8, 8, seed=1)
    gradient = mean_gradient(with_discrete_gradients(module), torch.cat((baseline, image)), 2)
    expected = captum.attr.DeepLift(module).attribute(image, baseline, target=2).detach()
    # The same quotients and products in float64.
    torch.testing.assert_close(gradient * (image - baseline)[0], expected[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("target", [0, 4])
def test_a_step_accounts_for_the_whole_change_of_the_output(target: int) -> None:
    module = seeded(Residual())
    ends = random(2, 3, 8, 8)
    gradient = mean_gradient(with_discrete_gradients(module), ends, target)
    change = module(ends)[:, target].diff()
    # Exact up to float64 rounding; the gradients at the ends are far less exact.
    torch.testing.assert_close((gradient * (ends[1] - ends[0])).sum(), change[0], rtol=0, atol=1e-11)
    ends.requires_grad_()
    (at_start, _) = torch.autograd.grad(module(ends)[0, target], ends)[0]
    assert ((at_start * (ends[1] - ends[0])).sum() - change[0]).abs() > 1e-2


def test_values_are_the_networks_own_with_pairs_and_without() -> None:
    module, images = seeded(Residual()), random(4, 3, 8, 8)
    network = with_discrete_gradients(module)
    expected = module(images)
    for paired in (None, torch.zeros(4).bool(), torch.tensor([True, True, False, False])):
        torch.testing.assert_close(network(images, paired), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-12)


def test_rows_that_are_not_paired_have_the_gradients_of_points() -> None:
    module, images = seeded(Residual()), random(4, 3, 8, 8).requires_grad_()
    network = with_discrete_gradients(module)
    (expected,) = torch.autograd.grad(module(images)[:, 1].sum(), images)
    (gradients,) = torch.autograd.grad(network(images, torch.tensor([False, True, False, True]))[:, 1].sum(), images)
    # A row depends on the next one only where it is paired; the last row has no next one.
    torch.testing.assert_close(gradients[[0, 3]], expected[[0, 3]], rtol=0, atol=1e-11)
    assert (gradients[1] - expected[1]).abs().max() > 1e-3


def test_rows_of_unlike_paths_share_a_pass() -> None:
    network = with_discrete_gradients(seeded(Residual()))
    first, second = random(2, 3, 8, 8, seed=5), random(3, 3, 8, 8, seed=6)
    points = torch.cat((first, second)).requires_grad_()
    paired = torch.tensor([True, False, True, True, False])
    (together,) = torch.autograd.grad(network(points, paired)[:, 0].sum(), points)
    for row, ends in ((0, first), (2, second[:2]), (3, second[1:])):
        # A row that is not paired does not depend on its neighbour.
        torch.testing.assert_close(together[row], mean_gradient(network, ends, 0), rtol=0, atol=1e-11)


def test_a_single_row_is_a_point() -> None:
    network, image = with_discrete_gradients(seeded(Residual())), random(1, 3, 8, 8).requires_grad_()
    (expected,) = torch.autograd.grad(network(image)[0, 0], image)
    (gradient,) = torch.autograd.grad(network(image, torch.tensor([True]))[0, 0], image)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations")
@pytest.mark.parametrize("make", [Residual, lambda: Transformer()], ids=["residual", "transformer"])
def test_the_scripted_network_equals_the_graph(make: Callable[[], nn.Module]) -> None:
    module = seeded(make())
    network, ends = with_discrete_gradients(module), random(2, 3, 8, 8)
    scripted = torch.jit.script(build_served(module, (3, 8, 8)))
    features = scripted.stem(ends)
    torch.testing.assert_close(scripted.tail(features), network(ends), rtol=0, atol=1e-12)

    def with_stem(points: Tensor, paired: Tensor) -> Tensor:
        return scripted.mean_slope_tail(scripted.stem(points), paired)

    expected = mean_gradient(network, ends, 3)
    with torch.jit.optimized_execution(False):
        torch.testing.assert_close(mean_gradient(with_stem, ends, 3), expected, rtol=0, atol=1e-11)


class SqueezeExcitation(nn.Module):
    """A product of a branch and of its own gate, and functions that bend."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        )
        self.last = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.hardswish(self.norm(self.first(images)))
        return self.last((features * self.gate(features)).mean((2, 3)))


class Transformer(nn.Module):
    """Patches, a class token, self-attention, layer normalisation and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.last = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        return self.last(self.layer(tokens)[:, 0])


class Attention(nn.Module):
    """Attention as it is written without a fused operator: two products of matrices around a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 4) for _ in range(3))
        self.last = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        weights = (self.query(tokens) @ self.key(tokens).transpose(1, 2) / 2).softmax(dim=-1)
        return self.last((weights @ self.value(tokens)).mean(dim=1))


NETWORKS = [Residual, SqueezeExcitation, Transformer, Attention]


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_modern_networks_account_for_the_whole_change(make: Callable[[], nn.Module]) -> None:
    module, ends = seeded(make()), random(2, 3, 8, 8)
    network = with_discrete_gradients(module)
    torch.testing.assert_close(network(ends, PAIR), module(ends), rtol=0, atol=1e-11)
    change = (mean_gradient(network, ends, 1) * (ends[1] - ends[0])).sum()
    expected = module(ends)[:, 1].diff()[0]
    assert expected.abs() > 1e-2
    # Where a function's argument moves by less than 0.001, its slope is that in the middle: 1e-6 of it.
    torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_rows_without_a_pair_have_the_gradients_of_points(make: Callable[[], nn.Module]) -> None:
    module, images = seeded(make()), random(3, 3, 8, 8).requires_grad_()
    network = with_discrete_gradients(module)
    (expected,) = torch.autograd.grad(module(images)[:, 1].sum(), images)
    paired = torch.tensor([True, False, False])
    (gradients,) = torch.autograd.grad(network(images, paired)[:, 1].sum(), images)
    torch.testing.assert_close(gradients[1:], expected[1:], rtol=1e-7, atol=1e-9)
    assert (gradients[0] - expected[0]).abs().max() > 1e-3


FUNCTIONS = [
    nn.LeakyReLU(0.1),
    nn.ELU(),
    nn.SELU(),
    nn.CELU(),
    nn.SiLU(),
    nn.Mish(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Hardtanh(-0.5, 1.5),
    nn.ReLU(),
    nn.ReLU6(),
    nn.Sigmoid(),
    nn.LogSigmoid(),
    nn.Tanh(),
    nn.Softplus(),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
@pytest.mark.parametrize("size", [3.0, 1e-3])
def test_a_mean_slope_is_the_mean_over_many_points(function: nn.Module, size: float) -> None:
    network = with_discrete_gradients(nn.Sequential(function, nn.Flatten()))
    start = 3 * random(1, 3, 8, 8)
    end = start + size * random(1, 3, 8, 8, seed=1)
    gradient = mean_gradient(
        lambda ends, paired: network(ends, paired).sum(1, keepdim=True), torch.cat((start, end)), 0
    )
    points = torch.lerp(start, end, (torch.arange(2000).double().view(-1, 1, 1, 1) + 0.5) / 2000).requires_grad_()
    (at_points,) = torch.autograd.grad(function(points).sum(), points)
    # The points miss a kink by half of a 2,000th of the way; the middle of a short segment may miss it altogether.
    kinks = nn.LeakyReLU, nn.SELU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.ReLU, nn.ReLU6
    allowed = 1e-3 if isinstance(function, kinks) else 2e-5
    torch.testing.assert_close(gradient, at_points.mean(0), rtol=0, atol=allowed)


@pytest.mark.parametrize("first_is_paired", [True, False])
@pytest.mark.parametrize("ceiling", [0.0, 6.0])
def test_a_relus_slopes_are_the_same_at_once_and_by_row(ceiling: float, first_is_paired: bool) -> None:
    relu, here = MeanSlopeRelu(ceiling), 5 * random(4, 3, 4, 4)
    here[1, 0] = here[0, 0]  # stays
    paired = torch.tensor([first_is_paired, True, False, True])
    torch.testing.assert_close(relu.slopes(here, paired), relu.slopes_by_row(here, paired), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first_is_paired", [True, False])
def test_a_functions_slopes_are_the_same_at_once_and_by_row(first_is_paired: bool) -> None:
    function, here = MeanSlopeFunction(nn.SiLU()), random(4, 4, 4, 3)
    here[1, 0] = here[0, 0] + 1e-4
    here[1, 1] = here[0, 1]
    values, paired = function.function(here), torch.tensor([first_is_paired, True, False, True])
    slopes = function.slopes(here, values, paired)
    torch.testing.assert_close(slopes, function.slopes_by_row(here, values, paired), rtol=0, atol=1e-12)
    assert slopes.isfinite().all()


@pytest.mark.parametrize(
    ("module", "spread"), [(MeanSoftmax(-1), 15.0), (MeanLayerNorm([8], 1e-6), 15.0), (MeanLayerNorm([8], 1e-6), 1e-3)]
)
def test_float16_does_not_overflow_where_rows_are_far_apart_or_flat(module: nn.Module, spread: float) -> None:
    inputs = (spread * random(4, 3, 8)).half().requires_grad_()
    constants = (None, None) if isinstance(module, MeanLayerNorm) else ()
    outputs = module(inputs, *constants, torch.tensor([True, True, True, False]))
    (gradients,) = torch.autograd.grad((outputs.float() * random(4, 3, 8).float()).sum(), inputs)
    assert outputs.isfinite().all()
    assert gradients.isfinite().all()


def test_a_masked_softmax_accounts_for_the_whole_change() -> None:
    inputs = random(2, 3, 6)
    inputs[..., 4:] = -torch.inf
    inputs.requires_grad_()
    values = MeanSoftmax(-1)(inputs, PAIR)
    torch.testing.assert_close(values, inputs.softmax(-1))
    weights = random(3, 6, seed=4)
    (gradient,) = torch.autograd.grad((values[0] * weights).sum(), inputs)
    step = (inputs[1] - inputs[0]).detach().nan_to_num()
    torch.testing.assert_close((gradient[0] * step).sum(), (weights * values.diff(dim=0)[0]).sum(), rtol=0, atol=1e-12)


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(images)[0]


class TokensFirst(nn.Module):
    """A softmax of rows that belong to places, not to images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(1, 0, 2, 3).softmax(dim=-1).permute(1, 0, 2, 3)


class Quotient(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images / images.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.GroupNorm(1, 3), "group_norm"),
        (nn.AdaptiveMaxPool2d(2), "adaptive_max_pool2d"),
        (Places(), "max_pool2d_with_indices"),
        (Quotient(), "norm"),
        (TokensFirst(), "softmax.int of rows that are not images"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_network_with_another_operator_is_left_as_it_was(layer: nn.Module, named: str) -> None:
    network = trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), layer), (3, 8, 8))
    before = (str(network.graph), network.code, dict(network.named_modules()))
    assert named in add_discrete_gradients(network)
    assert (str(network.graph), network.code, dict(network.named_modules())) == before


@pytest.mark.parametrize(
    ("layer", "start", "end", "slope"),
    [
        (MeanSlopeRelu(), -1.0, 3.0, 3 / 4),
        (MeanSlopeRelu(), 3.0, -1.0, 3 / 4),
        (MeanSlopeRelu(), 1.0, 2.0, 1.0),
        (MeanSlopeRelu(), -2.0, -1.0, 0.0),
        (MeanSlopeRelu(6.0), -2.0, 8.0, 6 / 10),
        (MeanSlopeRelu(6.0), 5.0, 9.0, 1 / 4),
        (MeanSlopeRelu(6.0), 7.0, 9.0, 0.0),
        (MeanSlopeRelu(6.0), 1.0, 2.0, 1.0),
    ],
    ids=str,
)
def test_a_mean_slope_is_the_part_of_the_way_on_which_the_activation_rises(
    layer: MeanSlopeRelu, start: float, end: float, slope: float
) -> None:
    inputs = torch.tensor([[start], [end]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(inputs, PAIR)[0].sum(), inputs)
    assert gradient[0].item() == pytest.approx(slope)


@pytest.mark.parametrize("value", [-1.0, 0.0, 2.0])
def test_an_activation_that_does_not_move_has_no_mean_slope(value: float) -> None:
    inputs = torch.full((2, 1), value, requires_grad=True)
    (gradient,) = torch.autograd.grad(MeanSlopeRelu()(inputs, PAIR)[0].sum(), inputs)
    assert gradient.tolist() == [[0.0], [0.0]]


def test_a_pools_gradient_is_shared_by_the_part_of_the_way_before_one_overtakes_the_other() -> None:
    # The first leads by 3 and then trails by 1, so it leads for three quarters of the segment.
    inputs = torch.tensor([[[[4.0, 1.0]]], [[[1.0, 2.0]]]], dtype=torch.float64, requires_grad=True)
    values = MeanSlopeMaxPool([1, 2])(inputs, PAIR)
    assert values.flatten().tolist() == [4, 2]
    (gradient,) = torch.autograd.grad(values[0].sum(), inputs)
    assert gradient.flatten().tolist() == pytest.approx([0.75, 0.25, 0, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (1, 2)},
        {"kernel_size": 3, "stride": 1, "dilation": 2},
        {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    ],
    ids=str,
)
def test_a_pool_of_any_shape_accounts_for_the_whole_change(options: dict) -> None:
    pool, ends = nn.MaxPool2d(**options), random(2, 3, 8, 8)
    weights = random(*pool(ends[:1]).shape[1:], seed=2)
    ends = ends.requires_grad_()
    (replacement,) = (part for part in with_discrete_gradients(pool).modules() if isinstance(part, MeanSlopeMaxPool))
    values = replacement(ends, PAIR)
    torch.testing.assert_close(values, pool(ends), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad((values[0] * weights).sum(), ends)
    change = ((values[1] - values[0]) * weights).sum()
    # Exact but for float64 rounding.
    torch.testing.assert_close((gradient[0] * (ends[1] - ends[0])).sum(), change, rtol=0, atol=1e-12)
    assert not gradient[1].any()


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(input=images)


def test_an_input_may_be_given_by_its_name() -> None:
    network = with_discrete_gradients(ByKeyword())
    images = random(2, 3, 4, 4)
    torch.testing.assert_close(network(images, PAIR), images.relu(), rtol=0, atol=0)
