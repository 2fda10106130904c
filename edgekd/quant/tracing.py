"""From an nn.Module to a graph of aten operators with a dynamic batch axis."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import StageError
from .graph import LAYERS, MATRIX, functional, operation
from .quiet import quiet

__all__ = ["MOST_IMAGES", "trace"]

#: torch.export wants a bound on the batch axis.
MOST_IMAGES = 65536


class _Flat(nn.Module):
    """Outputs as a tuple in a fixed order: what a plain graph returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def named(self, image: Tensor) -> dict[str, Tensor]:
        outputs = self.network(image)
        if isinstance(outputs, Tensor):
            outputs = {"logits": outputs}
        if not isinstance(outputs, dict) or "logits" not in outputs:
            raise StageError(
                f"the network returns {type(outputs).__name__}",
                where=type(self.network).__name__,
                hint="return the logits [N, K], or a dict of tensors with the key 'logits'",
            )
        return outputs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(image).values())


def trace(network: nn.Module, example: Tensor) -> tuple[GraphModule, list[str]]:
    """A functional graph of a copy of `network`, and the names of the tensors that it returns as a tuple.

    example: [N, C, H, W] float. The graph takes any N >= 1 and is in evaluation mode; dropout and batch norm can be
    switched with `graph.set_training`, other randomness (stochastic depth) stays off. What `graph.layers` says of a
    node are module paths of `network`, or of the network inside if it is wrapped to tap features.
    Raises StageError, with the line of the network that torch.export could not follow.
    """
    # Two images: torch.export takes an axis of length 1 for a constant.
    image = torch.cat([example, example])[:2].detach().float() if len(example) < 2 else example[:2].detach().float()
    flat = _Flat(copy.deepcopy(network).eval())
    axes = {"image": {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}}
    try:
        # With gradients and without its fast path, or attention becomes one opaque operator.
        with quiet(), _slow_attention(), torch.enable_grad():
            with torch.no_grad():
                expected = flat.named(image)
            exported = torch.export.export(flat, (image,), dynamic_shapes=axes)
            traced = exported.module(check_guards=False)
    except StageError:
        raise
    except Exception as error:
        raise StageError(
            f"torch.export cannot trace {type(network).__name__}: {_first_line(error)}",
            where=_place(error) or type(network).__name__,
            hint="forward() must not branch on tensor values or fix the batch size; use torch.where, and x.shape[0] "
            "or -1 for the batch. Networks that cannot be changed can be deployed without the quantize stage",
        ) from error
    graph = traced.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    output = graph.output_node()
    output.args = (tuple(output.args[0]),)  # type: ignore[arg-type]
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix("network.")
    # A new GraphModule holds just what the graph reads, without the exported program's input checks.
    module = GraphModule(_without_prefix(traced), graph, class_name="Traced")
    functional(module)
    _name_layers(module, "network.network." if hasattr(network, "taps") else "network.")
    with torch.no_grad():
        found = dict(zip(expected, module(image), strict=True))
    for name, value in expected.items():
        # A network that is not finite is reported where its ranges are set.
        if value.isfinite().all() and not torch.allclose(found[name], value, rtol=1e-3, atol=1e-4):
            raise StageError(
                f"the traced network computes other {name} than the original",
                where=type(network).__name__,
                hint="it overwrites a tensor of which it keeps a view, or is random in evaluation mode: replace "
                "operators such as relu_() by those that return a new tensor",
            )
    return module, list(expected)


def _without_prefix(traced: nn.Module) -> nn.Module:
    """The holder of the graph's attributes, with the network's own module paths beside the prefixed ones."""
    network = getattr(traced, "network", None)
    if network is None:  # it has neither parameters nor buffers
        return traced
    for name, child in network.named_children():
        traced.add_module(name, child)
    for name, parameter in network.named_parameters(recurse=False):
        traced.register_parameter(name, parameter)
    for name, buffer in network.named_buffers(recurse=False):
        traced.register_buffer(name, buffer)
    return traced


def _name_layers(module: GraphModule, prefix: str) -> None:
    """Note at each node the modules that it belongs to, from the outermost to the one that owns its weight."""
    for node in module.graph.nodes:
        stack = [path.partition("@")[0] for path, _ in node.meta.get("nn_module_stack", {}).values()]
        paths = [path.removeprefix(prefix) for path in stack if path.startswith(prefix)]
        weight = node.args[1] if operation(node) in MATRIX and len(node.args) > 1 else None
        if isinstance(weight, Node) and weight.op == "get_attr":
            owner = f"network.{weight.target}".removeprefix(prefix).rpartition(".")[0]
            paths += [owner] if owner not in paths else []
        node.meta[LAYERS] = tuple(paths)


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _place(error: BaseException) -> str:
    """The innermost line outside torch and this package: `file.py:12 in forward`."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    inner = [f for f in frames if f.name == "forward"] or frames
    return f"{Path(inner[-1].filename).name}:{inner[-1].lineno} in {inner[-1].name}" if inner else ""
