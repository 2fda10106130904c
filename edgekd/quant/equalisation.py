"""Cross-layer equalisation: channels of one range, before anything is quantized."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .graph import CONVOLUTIONS, MATRIX, operation
from .tracing import trace

__all__ = ["equalise"]

#: f(s x) = s f(x) for s > 0: element by element, and channel by channel where channels are the second axis, as behind
#: convolutions. Behind a linear layer they are the last.
ELEMENTWISE = {"relu", "leaky_relu", "dropout", "contiguous", "clone"}
COMMUTES = {
    *ELEMENTWISE,
    *("flatten", "view", "reshape", "pad", "mean"),
    *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
}
SWEEPS = 50


class _Pair(NamedTuple):
    """Two layers in a row: parameters of the network by name."""

    first: str
    bias: str | None
    norm: tuple[str, str, str, float] | None  #: gamma, beta, running variance, epsilon
    second: str
    groups: int


@torch.no_grad()
def equalise(network: nn.Module, example: Tensor) -> int:
    """Even out the channel ranges of neighbouring layers of a float network, in place; returns how many pairs.

    network and example [N, C, H, W] as for `prepare`. Where a layer's output reaches only one other layer, through
    nothing but batch norm, ReLU, pooling and the like, channel i of the first is divided by s_i and the second's weight
    for it multiplied: the same function. With s_i = sqrt(r1_i / r2_i), the ratio of the largest weights, both are
    sqrt(r1_i r2_i) afterwards; chains are swept until nothing changes. Behind ReLU6 or hardswish, which do not commute
    with a factor, layers stay as they are. Weights that several layers share are left alone.
    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
    arXiv:1906.04721, section 4.1. Raises StageError for networks that torch.export cannot follow.
    """
    traced, _ = trace(network, example)
    pairs = _pairs(traced)
    values = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers())}
    pairs = [p for p in pairs if p.first in values and p.second in values]
    for _ in range(SWEEPS):
        largest = max((_even_out(values, pair) for pair in pairs), default=0.0)
        if largest < 1e-3:
            break
    return len(pairs)


def _even_out(values: dict[str, Tensor], pair: _Pair) -> float:
    """One pair; returns the largest change as |log s|."""
    first, second = values[pair.first], values[pair.second]
    out = first.flatten(1).abs().amax(dim=1)
    if pair.norm:
        gamma, _, variance, epsilon = pair.norm
        out = out * values[gamma].abs() / torch.sqrt(values[variance] + epsilon)
    # [groups, outputs and inputs of a group, kernel]: of depthwise layers, one input in each group.
    grouped = second.reshape(pair.groups, second.shape[0] // pair.groups, second.shape[1], -1)
    into = grouped.abs().amax(dim=(1, 3)).flatten()
    factor = torch.where((out > 0) & (into > 0), torch.sqrt(out / into), 1.0)  # dead channels stay as they are
    for name in pair.norm[:2] if pair.norm else (pair.first, pair.bias):
        if name is not None:
            value = values[name]
            value.div_(factor.reshape(-1, *[1] * (value.dim() - 1)))
    grouped = grouped * factor.reshape(pair.groups, 1, -1, 1)
    second.copy_(grouped.reshape(second.shape))
    return float(factor.log().abs().max())


def _pairs(module: GraphModule) -> list[_Pair]:
    nodes = [n for n in module.graph.nodes if operation(n) in MATRIX]
    readers: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
    found = []
    for node in nodes:
        pair = _pair(node)
        if pair is None:
            continue
        names = [pair.first, pair.second, *(pair.norm[:3] if pair.norm else ()), *([pair.bias] if pair.bias else ())]
        if all(readers[name] == 1 for name in names):
            found.append(pair)
    return found


def _pair(first: Node) -> _Pair | None:
    """The layer that alone reads what `first` computes, if nothing in between minds a factor."""
    norm = None
    node = _only_reader(first)
    if node is not None and operation(node) == "batch_norm":
        gamma, beta, _, variance = (_name(a) for a in node.args[1:5])
        if operation(first) not in CONVOLUTIONS or gamma is None or beta is None or variance is None:
            return None
        epsilon: Any = node.args[7]
        norm = gamma, beta, variance, float(epsilon)
        node = _only_reader(node)
    convolved = operation(first) in CONVOLUTIONS
    while node is not None and (_commutes(node) if convolved else operation(node) in ELEMENTWISE):
        node = _only_reader(node)
    if node is None or operation(node) not in MATRIX or not _same_axis(convolved, node):
        return None
    weight, bias, second = _name(first.args[1]), _name(first.args[2] if len(first.args) > 2 else None), None
    second = _name(node.args[1])
    if weight is None or second is None or (bias is None and len(first.args) > 2 and first.args[2] is not None):
        return None
    groups: Any = node.args[6] if len(node.args) > 6 else 1
    channels = node.args[1].meta["val"].shape[1] * groups  # type: ignore[union-attr]
    if channels != first.args[1].meta["val"].shape[0]:  # type: ignore[union-attr]
        return None
    return _Pair(weight, bias, norm, second, groups)


def _same_axis(convolved: bool, second: Node) -> bool:
    """Whether the axis that the second layer multiplies holds the first one's channels."""
    if operation(second) in CONVOLUTIONS:
        return convolved
    return not convolved or second.args[0].meta["val"].dim() == 2  # type: ignore[union-attr]


def _commutes(node: Node) -> bool:
    name = operation(node)
    if name == "mean":
        dims: Any = node.args[1] if len(node.args) > 1 else None
        rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        return dims is not None and all(d % rank > 1 for d in dims)
    if name == "pad":
        return all(value in ("constant", 0, None) for value in (*node.args[2:], *node.kwargs.values()))
    return name in COMMUTES


def _only_reader(node: Node) -> Node | None:
    """Outputs count as readers too."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def _name(node: object) -> str | None:
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None
