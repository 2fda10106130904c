"""Fake quantization behind operators that only move values: needed by runtimes, a nuisance in training."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from .fake_quantize import ActivationFakeQuantize
from .quantizer import moves

__all__ = ["drop_echoes", "restore_echoes"]


def drop_echoes(module: GraphModule) -> None:
    """Remove fake quantization behind operators that only move quantized values.

    It changes nothing, costs time, and a slice or a pooled part would narrow the tracked range of the whole.
    """
    source: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if _quantizes(module, node):
            before = node.args[0]
            if moves(before) and source.get(before) == node.target:
                node.replace_all_uses_with(before)
                module.graph.erase_node(node)
            else:
                source[node] = node.target
        elif moves(node) and node.args[0] in source:
            source[node] = source[node.args[0]]
    module.recompile()


def restore_echoes(module: GraphModule) -> None:
    """Put them back before conversion: runtimes want Q/DQ around every operator they run in integers."""
    for node in list(module.graph.nodes):
        if moves(node) and _quantizes(module, node.args[0]):
            with module.graph.inserting_after(node):
                echo = module.graph.call_module(node.args[0].target, (node,))
            node.replace_all_uses_with(echo, delete_user_cb=lambda user, echo=echo: user is not echo)
    module.recompile()


def _quantizes(module: GraphModule, node: Any) -> bool:
    if not isinstance(node, Node) or node.op != "call_module":
        return False
    return isinstance(module.get_submodule(str(node.target)), ActivationFakeQuantize)
