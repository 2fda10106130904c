"""A teacher with its batch norms folded into the convolutions before them: the same answers, sooner."""

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

    Module paths stay (a folded norm becomes an identity). A convolution that is tapped stays as it is, and so do layers
    with hooks or parametrizations and those whose tensors are read by others. A network whose forward cannot be traced
    is given back unfolded.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    inner, taps = network, set[str]()
    while hasattr(inner, "taps") or hasattr(inner, "known"):  # wrapped to be tapped, or to place its classes
        taps |= set(getattr(inner, "taps", ()))
        inner = inner.get_submodule("network")
    for conv, norm in list(_pairs(inner)):
        if not _between(conv, norm, taps):
            pair: Any = inner.get_submodule(conv), inner.get_submodule(norm)
            inner.set_submodule(conv, fuse_conv_bn_eval(*pair))
            inner.set_submodule(norm, nn.Identity().eval())
    return network


def _pairs(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of convolutions and of the norms that alone take what they give."""
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True  # whoever reads a norm's statistics is a node, as for weights
    try:
        nodes = tracer.trace(network).nodes
    except Exception:  # a forward that looks at its input: whatever it raises, nothing is folded
        return
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    owners = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    # Hooks may compute the weight, as those of weight_norm do, or look at what goes in and out.
    hooked = {path for path, module in network.named_modules() if module._forward_pre_hooks or module._forward_hooks}
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        first, second = str(before.target), str(node.target)
        conv, norm = network.get_submodule(first), network.get_submodule(second)
        shown = _between(first, second, read | hooked) or _between(second, first, read | hooked)
        once = calls[first] == calls[second] == 1 and all(owners[id(p)] == 1 for p in conv.parameters())
        kinds = type(conv) in CONVOLUTIONS and type(norm) in NORMS and norm.running_mean is not None
        if kinds and once and not shown:
            yield first, second


def _between(path: str, other: str, seen: set[str]) -> bool:
    """Whether one of the modules `seen` is or holds the first without the other."""
    return any(f"{path}.".startswith(f"{one}.") and not other.startswith(f"{one}.") for one in seen)
