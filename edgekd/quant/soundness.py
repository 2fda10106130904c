"""Ranges that no integer can stand for."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ..errors import StageError
from .fake_quantize import ActivationFakeQuantize
from .graph import layers, operation

__all__ = ["check_ranges"]


def check_ranges(graph: GraphModule, *, alive: bool, left_out: float = 0) -> None:
    """Raise StageError, naming the layer, for a range that was never set or is not finite; `alive`: or is zero.

    `left_out`: the percentage of the values that ranges leave out at each end.
    """
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, ActivationFakeQuantize):
            continue
        low, high = module.lowest.item(), module.highest.item()
        where = _described(node.args[0])
        if low > high:
            raise StageError(
                f"the range of {where} was never set",
                where="quantization",
                hint="calibrate it with real images first",
            )
        if not module.observed:
            raise StageError(
                f"activations became NaN or infinite: no range can hold {where}",
                where="quantization",
                hint="look at the weights and at the training loss",
            )
        if alive and low == high == 0 and left_out:
            raise StageError(
                f"{where} is 0 but for less than {left_out:.4g} % of its values, which its range leaves out",
                where="quantization",
                hint="a higher percentile, or ranges = 'min-max'",
            )
        if alive and low == high == 0:
            raise StageError(
                f"{where} is 0 for every calibration image: it has no range",
                where="quantization",
                hint="the layer is dead: prune it away, heal the network first, or keep the layer in float",
            )


def _described(source: Node) -> str:
    """Which value it is, in the network's own names."""
    if source.op == "placeholder":
        return "the image"
    within = f" in {layers(source)[-1]}" if layers(source) and layers(source)[-1] else ""
    return f"the output of {operation(source) or source.name}{within}"
