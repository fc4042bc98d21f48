"""A network as one flat graph of ATen operators, by `torch.export`."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from error_reasons import reason
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

aten = torch.ops.aten

# Images in the example that a network is traced with: PyTorch takes sizes of 0 and 1 for constants.
_EXAMPLE_IMAGES = 2


class TracingError(Exception):
    """`torch.export` cannot read the network; the message says why."""


def trace(module: nn.Module, input_shape: Sequence[int]) -> GraphModule:
    """The graph of a network with one input [n, *input_shape] and one output, for any n.

    Constants are computed, and batch normalisation is folded into the convolution before it. The graph owns copies of
    the weights. Its nodes keep ``meta["val"]``, which has the shape of their values.

    Raises:
        TracingError: control flow that depends on values, a fixed batch size, or several outputs.
    """
    dtype = next((weight.dtype for weight in module.parameters()), torch.float32)
    example = torch.zeros(_EXAMPLE_IMAGES, *input_shape, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's own code
            program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            traced = program.run_decompositions({}).module(check_guards=False)
    except Exception as error:  # torch.export raises whatever the network's code stumbles over
        why = reason(error)
        if why.startswith("Constraints violated"):
            why = "its code fixes the batch size: use images.shape[0] instead of len(images)"
        raise TracingError(why) from None
    assert isinstance(traced, GraphModule)
    network = _flatten(traced)
    _simplify(network)
    _fold_constants(network)
    for node in network.graph.nodes:
        if node.kwargs.get("device") is not None:
            raise TracingError(f"{node.target} makes a tensor on a fixed device")
    _fold_batch_norms(network)
    finish(network)
    return network


def add_weight(network: GraphModule, value: Tensor) -> str:
    """Add a copy of a tensor to a network's weights; returns its name."""
    name = f"weight_{len(network._parameters)}"
    network.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
    return name


def weight_of(network: GraphModule, node: Any) -> Tensor | None:
    """The value of a node that reads a weight; None for any other argument of a node."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    weight: Tensor = getattr(network, str(node.target))
    return weight.detach()


def finish(network: GraphModule) -> None:
    """Remove nodes without users and weights without nodes, and compile the graph."""
    network.graph.eliminate_dead_code()
    network.graph.lint()
    used = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    for name in set(network._parameters) - used:
        network._parameters[name] = None
    network.recompile()


def _flatten(traced: GraphModule) -> GraphModule:
    """A copy without nested modules, whose output is one tensor."""
    network = GraphModule(nn.Module(), Graph())
    graph = Graph()
    copies: dict[Node, Node] = {}
    names: dict[Any, str] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            outputs = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            if len(outputs) != 1:
                raise TracingError(f"it has {len(outputs)} outputs, not its logits alone")
            graph.output(copies[outputs[0]])
        elif node.op == "get_attr":
            if node.target not in names:
                names[node.target] = add_weight(network, operator.attrgetter(node.target)(traced))
            copies[node] = graph.get_attr(names[node.target])
            copies[node].meta = dict(node.meta)
        elif node.op in ("placeholder", "call_function"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        else:
            raise TracingError(f"it calls {node.target}")
    network.graph = graph
    return network


def _simplify(network: GraphModule) -> None:
    """Remove copies of tensors, and use operators that read tensors of any memory format."""
    for node in list(network.graph.nodes):
        if node.target in (aten.clone.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
        elif node.target == aten._assert_tensor_metadata.default:
            network.graph.erase_node(node)  # of the example
        elif node.target in (aten.to.dtype, aten._to_copy.default, aten.type_as.default):
            if node.meta["val"].dtype == node.args[0].meta["val"].dtype:
                node.replace_all_uses_with(node.args[0])
                network.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target == aten._native_batch_norm_legit_no_training.default:
            (values,) = node.users  # the statistics are not used in evaluation mode
            features, weight, bias, mean, variance, momentum, epsilon = node.args
            node.target = aten.batch_norm.default
            node.args = (features, weight, bias, mean, variance, False, momentum, epsilon, False)
            node.meta = dict(values.meta)
            values.replace_all_uses_with(node)
            network.graph.erase_node(values)


def _fold_constants(network: GraphModule) -> None:
    """Compute what depends on weights alone."""

    def is_constant(node: Node) -> bool:
        return node.op == "call_function" and all(arg.op == "get_attr" for arg in node.all_input_nodes)

    for node in network.graph.nodes:
        # An operator without inputs makes a tensor, too, if it is not a size.
        if not is_constant(node) or not isinstance(node.meta.get("val"), Tensor):
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda arg: weight_of(network, arg))
        with network.graph.inserting_before(node):
            weight = network.graph.get_attr(add_weight(network, node.target(*args, **kwargs)))
        weight.meta = dict(node.meta)
        node.replace_all_uses_with(weight)


def _fold_batch_norms(network: GraphModule) -> None:
    """Fold each batch normalisation into the convolution whose values it alone reads."""
    for norm in list(network.graph.nodes):
        if norm.target != aten.batch_norm.default:
            continue
        convolution, (weight, bias, mean, variance), epsilon = norm.args[0], norm.args[1:5], norm.args[7]
        if convolution.target != aten.conv2d.default or len(convolution.users) > 1 or convolution.kwargs:
            continue
        given = [*(*convolution.args[1:3], None)[:2], mean, variance, weight, bias]
        values: list[Any] = [weight_of(network, node) for node in given]
        if any(value is None and node is not None for node, value in zip(given, values)):
            continue  # it is computed on the way
        kernel, bias_before, means, variances, scale, shift = values
        folded = fuse_conv_bn_weights(kernel, bias_before, means, variances, epsilon, scale, shift)
        with network.graph.inserting_before(convolution):
            nodes = [network.graph.get_attr(add_weight(network, value)) for value in folded]
        convolution.args = (convolution.args[0], *nodes, *convolution.args[3:])
        norm.replace_all_uses_with(convolution)
        network.graph.erase_node(norm)
