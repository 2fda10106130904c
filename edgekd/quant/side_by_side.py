"""A prepared network run layer by layer, in float and quantized at once, so that each layer can be corrected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg

from ..errors import UsageError
from .fake_quantize import WeightPerChannelFakeQuantize
from .graph import MATRIX, attribute, operation
from .prepared import Prepared, as_prepared

__all__ = ["Layer", "layers_side_by_side"]


class Layer(NamedTuple):
    """A quantized convolution or linear layer, and what it reads, batch by batch: in the float network, and with
    everything before it quantized. `weight` and `bias` may be changed in place; `before` is the float weight."""

    node: Node
    weight: Tensor
    bias: Tensor | None
    quantizer: WeightPerChannelFakeQuantize
    before: Tensor
    floats: list[Tensor]
    quantized: list[Tensor]

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of `x` with another weight, without its bias."""
        found: Tensor = self.node.target(x, weight, None, *self.node.args[3:], **self.node.kwargs)  # type: ignore[operator]
        return found


@torch.no_grad()
def layers_side_by_side(prepared: nn.Module, batches: Iterable[Tensor]) -> Iterator[Layer]:
    """Each quantized layer with a weight of its own, in the order in which they run.

    What follows sees the changes made to it. Every batch [N, C, H, W] is held in memory, with the values that are still
    needed. The network is in evaluation mode meanwhile. Raises UsageError for a network prepared for training, in which
    batch norm is not folded yet, and when there is no image.
    """
    network = as_prepared(prepared)
    if network.qat:
        raise UsageError("only for post-training quantization", where="prepare", hint="prepare it with qat=False")
    images = [batch.to(network.frozen.device) for batch in batches]
    if not images:
        raise UsageError("no image to correct with", where="calibration data", hint="a few hundred images suffice")
    training = network.training
    network.eval()
    try:
        yield from _walk(network, images)
    finally:
        network.train(training)


def _walk(network: Prepared, images: list[Tensor]) -> Iterator[Layer]:
    module = network.network
    nodes = list(module.graph.nodes)
    before = {n.target: attribute(module, n).detach().clone() for n in nodes if n.op == "get_attr"}
    shared = Counter(str(_weight(n).target) for n in nodes if operation(n) in MATRIX and _weight(n) is not None)
    last = {argument: node for node in nodes for argument in node.all_input_nodes}
    floats: dict[Node, list[Any]] = {}
    quantized: dict[Node, list[Any]] = {}

    def constant(node: Node, original: bool) -> Any:
        """Parameters, and what is quantized of them, are read anew: they may have changed."""
        if node.op == "get_attr":
            return before[node.target] if original else attribute(module, node).detach()
        value = constant(node.args[0], original)  # type: ignore[arg-type]
        return value if original else module.get_submodule(str(node.target))(value).detach()

    constants: set[Node] = set()
    for node in nodes:
        if node.op == "output":
            return
        if node.op == "get_attr" or (node.op == "call_module" and node.args[0] in constants):
            constants.add(node)
        elif node.op == "placeholder":
            floats[node] = quantized[node] = images
        elif node.op == "call_module":
            floats[node] = floats[node.args[0]]
            quantizer = module.get_submodule(str(node.target))
            quantized[node] = [quantizer(x) for x in quantized[node.args[0]]]
        else:
            layer = _layer(network, node, before, floats, quantized)
            if layer is not None and shared[str(_weight(node).target)] == 1:
                yield layer
            for values, original in ((floats, True), (quantized, False)):
                values[node] = [_call(node, values, i, constant, constants, original) for i in range(len(images))]
        for argument in node.all_input_nodes:
            if last[argument] is node and argument not in constants:
                del floats[argument], quantized[argument]


def _call(node: Node, values: Any, i: int, constant: Any, constants: set[Node], original: bool) -> Any:
    def value(argument: Node) -> Any:
        return constant(argument, original) if argument in constants else values[argument][i]

    args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _weight(node: Node) -> Any:
    """The get_attr node of a matrix layer's weight, behind its quantizer."""
    weight: Any = node.args[1]
    if weight.op == "call_module":
        weight = weight.args[0]
    return weight if weight.op == "get_attr" else None


def _layer(
    network: Prepared, node: Node, before: dict[Any, Tensor], floats: dict[Node, Any], quantized: dict[Node, Any]
) -> Layer | None:
    source: Any = node.args[1] if operation(node) in MATRIX else None
    if source is None or source.op != "call_module":
        return None
    quantizer = network.network.get_submodule(str(source.target))
    if not isinstance(quantizer, WeightPerChannelFakeQuantize):
        return None
    weight = _weight(node)
    bias: Any = node.args[2] if len(node.args) > 2 else None
    own = bias is not None and bias.op == "get_attr" and len(bias.users) == 1
    return Layer(
        node,
        attribute(network.network, weight).data,
        attribute(network.network, bias).data if own else None,
        quantizer,
        before[weight.target],
        floats[node.args[0]],  # type: ignore[index]
        quantized[node.args[0]],  # type: ignore[index]
    )
