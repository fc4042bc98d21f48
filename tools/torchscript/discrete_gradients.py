"""Give a network's graph a second input, with which its gradients are discrete gradients over segments of a path.

Discrete gradients are those of Gonzalez (doi 10.1007/BF02440162) and of automatic discrete differentiation (Matsubara
et al., arXiv 1905.08604): linear operators keep their gradient, and the others get one whose product with the change
of their inputs is the exact change of their outputs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from tools.torchscript.exported_graph import finish
from tools.torchscript.mean_products import MeanAttention, MeanLayerNorm, MeanProduct, MeanSoftmax
from tools.torchscript.mean_slopes import MeanSlopeFunction, MeanSlopeMaxPool, MeanSlopeRelu

aten = torch.ops.aten

# Affine in their first argument, if the others are constant. Many only rearrange, repeat or drop values.
AFFINE = {
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.linear.default,
    aten.batch_norm.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.neg.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.repeat.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.chunk.default,
    aten.unbind.int,
    operator.getitem,
    aten.roll.default,
    aten.flip.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.mul.Scalar,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.dropout.default,
}
# Affine in all their arguments together.
SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default}
# Affine in each of two arguments, if the other one is constant.
PRODUCTS = {aten.mul.Tensor: False, aten.matmul.default: True, aten.bmm.default: True}
# Functions of one variable, applied to each element.
FUNCTIONS = {
    aten.leaky_relu.default,
    aten.elu.default,
    aten.selu.default,
    aten.celu.default,
    aten.silu.default,
    aten.mish.default,
    aten.gelu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.relu6.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.sigmoid.default,
    aten.log_sigmoid.default,
    aten.tanh.default,
    aten.softplus.default,
    aten.exp.default,
}


def dependents(source: Node) -> set[Node]:
    """The nodes whose values depend on the values of ``source``, with itself. Sizes do not."""
    found = {source}
    for node in source.graph.nodes:
        is_value = not isinstance(node.meta.get("val"), (int, torch.SymInt))
        if is_value and node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def is_affine(node: Node, changing: set[Node]) -> bool:
    """Whether an operator is affine in those of its arguments that are in ``changing``, taken together."""
    if node.op != "call_function":
        return False
    number = sum(argument in changing for argument in node.all_input_nodes)
    if node.target in SUMS:
        return True
    if node.target in PRODUCTS:
        return number == 1 and node.args[0] is not node.args[1]
    return node.target in AFFINE and number == 1 and node.args[0] in changing


def is_batch_first(node: Node, features: Node) -> bool:
    """Whether each row of a node's value belongs to the same row of ``features``."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dim() > 0 and str(value.shape[0]) == str(features.meta["val"].shape[0])


def add_discrete_gradients(network: GraphModule) -> str:
    """Add a second input, ``paired`` (bool [n], default None), to a network of one input.

    Returns:
        Empty if it was added; otherwise the operator whose discrete gradient is not known. The network is unchanged
        then.
    """
    (features,) = (node for node in network.graph.nodes if node.op == "placeholder")
    changing = dependents(features)
    replacements: list[tuple[Node, nn.Module, tuple[Any, ...]]] = []
    for node in network.graph.nodes:
        if node not in changing or node is features or is_affine(node, changing):
            continue
        replacement = _replacement(node)
        read = changing.intersection(node.all_input_nodes)
        if replacement is None or not read.issubset(replacement[1]):
            return str(node.target)
        module, arguments = replacement
        if not all(is_batch_first(argument, features) for argument in read):
            return f"{node.target} of rows that are not images"
        replacements.append((node, module, arguments))
    with network.graph.inserting_after(features):
        paired = network.graph.placeholder("paired", type_expr=Tensor | None, default_value=None)
    for number, (node, module, arguments) in enumerate(replacements):
        name = f"discrete_{number}"
        network.add_submodule(name, module)
        node.op, node.target, node.args, node.kwargs = "call_module", name, (*arguments, paired), {}
    finish(network)
    return ""


def _replacement(node: Node) -> tuple[nn.Module, tuple[Any, ...]] | None:
    """A module with the discrete gradient of an operator, and its arguments; None if there is none."""
    operator_ = node.target
    if not isinstance(operator_, torch._ops.OpOverload):
        return None
    given: dict[str, Any] = dict(zip((argument.name for argument in operator_._schema.arguments), node.args))
    given |= node.kwargs
    if operator_ == aten.relu.default:
        return MeanSlopeRelu(), node.args[:1]
    if operator_ == aten.relu6.default or (operator_ == aten.hardtanh.default and given.get("min_val") == 0):
        return MeanSlopeRelu(6.0 if operator_ == aten.relu6.default else float(given.get("max_val", 1))), node.args[:1]
    if operator_ in FUNCTIONS:
        return MeanSlopeFunction(_function_module(operator_, node)), node.args[:1]
    if operator_ == aten.max_pool2d.default:
        kernel, stride, padding, dilation = (
            _pair(given.get(name)) for name in ("kernel_size", "stride", "padding", "dilation")
        )
        assert kernel is not None
        return MeanSlopeMaxPool(kernel, stride, padding, dilation, bool(given.get("ceil_mode"))), node.args[:1]
    if operator_ in PRODUCTS:
        return MeanProduct(PRODUCTS[operator_]), node.args[:2]
    if operator_ == aten.softmax.int and given.get("dtype") is None:
        return MeanSoftmax(given["dim"]), node.args[:1]
    if operator_ == aten.layer_norm.default:
        module = MeanLayerNorm(list(given["normalized_shape"]), given.get("eps", 1e-5))
        return module, (node.args[0], given.get("weight"), given.get("bias"))
    is_plain = given.get("attn_mask") is None and not given.get("is_causal") and not given.get("enable_gqa")
    if operator_ == aten.scaled_dot_product_attention.default and is_plain:
        return MeanAttention(given.get("scale")), node.args[:3]
    return None


def _function_module(function: torch._ops.OpOverload, node: Node) -> GraphModule:
    """A module that applies a node's function, with its constants, to one input."""
    graph = Graph()
    inputs = graph.placeholder("inputs")
    graph.output(graph.call_function(function.overloadpacket, (inputs, *node.args[1:]), dict(node.kwargs)))
    return GraphModule(nn.Module(), graph)


def _pair(value: Any) -> list[int] | None:
    """A size for height and one for width."""
    if not value:
        return None
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * 2 if len(sizes) == 1 else sizes
