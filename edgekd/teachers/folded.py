"""A teacher with its batch norms folded into the convolutions before them: the same answers, a tenth sooner."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["folded"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def folded(network: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode whose batch norms are folded where a convolution feeds nothing else.

    Module paths stay (a folded norm becomes an identity), and a convolution that is tapped stays as it is. A network
    whose forward cannot be traced is given back unfolded.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    inner, taps = network, set[str]()
    while hasattr(inner, "taps") or hasattr(inner, "known"):  # wrapped to be tapped, or to place its classes
        taps |= set(getattr(inner, "taps", ()))
        inner = inner.get_submodule("network")
    for conv, norm in list(_pairs(inner)):
        if conv not in taps:
            pair: Any = inner.get_submodule(conv), inner.get_submodule(norm)
            inner.set_submodule(conv, fuse_conv_bn_eval(*pair))
            inner.set_submodule(norm, nn.Identity().eval())
    return network


def _pairs(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of convolutions and of the norms that alone take what they give."""
    try:
        nodes = fx.Tracer().trace(network).nodes
    except Exception:  # a forward that looks at its input: whatever it raises, nothing is folded
        return
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    owners = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = (network.get_submodule(str(n.target)) for n in (before, node))
        once = calls[str(before.target)] == calls[str(node.target)] == 1
        alone = all(owners[id(p)] == 1 for p in conv.parameters())
        if once and alone and type(conv) in CONVOLUTIONS and type(norm) in NORMS and norm.running_mean is not None:
            yield str(before.target), str(node.target)
