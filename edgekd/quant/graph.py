"""Small questions about and edits of an exported graph (torch.fx nodes that call aten operators)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

__all__ = [
    "CONVOLUTIONS",
    "LAYERS",
    "MATRIX",
    "attribute",
    "functional",
    "layers",
    "operation",
    "set_training",
    "users",
]

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
#: Operators that are one product with a weight.
MATRIX = CONVOLUTIONS | {"linear"}
#: Where `trace` leaves the module paths of a node, in its meta.
LAYERS = "layers"

#: Operators whose arguments hold the mode they were exported in: name -> position of that flag.
MODES = {"batch_norm": 5, "dropout": 2, "alpha_dropout": 2, "feature_dropout": 2}


def operation(node: Node) -> str:
    """The aten operator's name without overload: `conv2d`; empty for anything else."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, _, name = node.target.name().partition("::")
    return name.partition(".")[0] if namespace == "aten" else ""


def layers(node: Node) -> tuple[str, ...]:
    """Paths of the modules that a node of a traced network belongs to, the innermost last; () if of none."""
    return node.meta.get(LAYERS, ())


def users(node: Node) -> list[Node]:
    """Who reads this value, apart from the graph's outputs: taps are dropped from what is deployed."""
    return [user for user in node.users if user.op != "output"]


def attribute(module: GraphModule, node: Any) -> torch.Tensor:
    """The parameter or buffer that a get_attr node reads."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def functional(module: GraphModule) -> None:
    """Replace in-place operators (`relu_`, `+=`) by those that return a new tensor.

    A quantized copy inserted behind a tensor that is later overwritten would miss the change. torch.export already
    lets later readers of the tensor read the operator's result; views made before it are not followed.
    """
    for node in list(module.graph.nodes):
        name = operation(node)
        target = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") and name[0] != "_" else None
        overload = getattr(target, node.target._overloadname, None) if target is not None else None
        written = node.args[0] if node.args else None
        if overload is None or not isinstance(written, Node) or written.op == "get_attr":
            continue
        node.target = overload
    module.graph.lint()
    module.recompile()


def set_training(module: GraphModule, training: bool, batch_norm: bool) -> None:
    """Switch dropout to `training`, and batch norm to batch statistics (`batch_norm`) or stored ones.

    torchao's own switch replaces patterns, and with them every momentum, epsilon and dropout rate by the defaults.
    """
    changed = False
    for node in module.graph.nodes:
        name = operation(node)
        if name not in MODES or (name == "batch_norm" and node.args[3] is None):
            continue
        mode = batch_norm if name == "batch_norm" else training
        if node.args[MODES[name]] != mode:
            node.update_arg(MODES[name], mode)
            changed = True
    if changed:
        module.recompile()
