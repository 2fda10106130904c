"""What became of each product in a prepared network: in integers, or float and why."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn
from torch.fx import Node

from .fake_quantize import WeightPerChannelFakeQuantize
from .graph import MATRIX, layers, operation
from .prepared import Prepared, as_prepared, prepare
from .quantizer import has_weight, wanted_float
from .scheme import Scheme

__all__ = ["Placement", "matrix_layers", "placements"]

#: Products that no scheme quantizes: operator -> why.
FLOAT = {
    **dict.fromkeys(("matmul", "bmm", "baddbmm", "mm", "addmm", "einsum"), "a product of two activations"),
    "scaled_dot_product_attention": "attention: products of two activations with a softmax between them",
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "runtimes keep transposed convolutions in float"
    ),
}


class Placement(NamedTuple):
    """One product of the network. `path` is its module's; the same path may come several times."""

    path: str
    operation: str
    quantized: bool
    reason: str  #: why it is float; empty if it is quantized
    node: Node  #: in `Prepared.network.graph`


def placements(prepared: nn.Module) -> list[Placement]:
    """Every convolution, linear layer and matrix product of a prepared network, in the order in which they run."""
    prepared = as_prepared(prepared)
    found = []
    for node in prepared.network.graph.nodes:
        name = operation(node)
        if name not in MATRIX and name not in FLOAT:
            continue
        reason = "" if _has_integer_weight(prepared, node) else _why_float(node, prepared.float_layers)
        path = layers(node)[-1] if layers(node) else ""
        found.append(Placement(path, name, not reason, reason, node))
    return found


def matrix_layers(network: nn.Module, example: Tensor, scheme: Scheme) -> list[str]:
    """The module paths that `prepare` would quantize, each once, in the order in which they run.

    network and example as for `prepare`, which also says what is raised. Every path is one for `float_layers`.
    """
    quantized = (p.path for p in placements(prepare(network, example, scheme, qat=True)) if p.quantized)
    return list(dict.fromkeys(quantized))


def _has_integer_weight(prepared: Prepared, node: Node) -> bool:
    weight = node.args[1] if operation(node) in MATRIX else None
    if not isinstance(weight, Node) or weight.op != "call_module":
        return False
    return isinstance(prepared.network.get_submodule(str(weight.target)), WeightPerChannelFakeQuantize)


def _why_float(node: Node, float_layers: Collection[str]) -> str:
    if operation(node) in FLOAT:
        return FLOAT[operation(node)]
    if wanted_float(node, float_layers):
        return "kept in float by choice"
    return "" if has_weight(node) else "its weight is calculated from other values"
