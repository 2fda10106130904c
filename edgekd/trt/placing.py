"""Which engine layer computes which matrix layer of a file, and in which precision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .graph import DEQUANTIZE, QUANTIZE
from .layers import EngineLayer
from .matrix import MOVES, MatrixNode
from .verification import Fused, MatrixLayer

__all__ = ["placed"]

#: Kinds of engine layers that multiply matrices; generated code is one where its name says so.
PRODUCTS = ("correlation", "deconv", "gemm", "runtime_fusion")
GENERATED = re.compile(r"gemm|mha|Fc|Corr")
#: Of what is computed in one engine layer, this is no work of its own.
UNTOLD = MOVES | {QUANTIZE, DEQUANTIZE}


def placed(nodes: Sequence[MatrixNode], engine: Sequence[EngineLayer], ops: Mapping[str, str]) -> list[MatrixLayer]:
    """Every matrix node with the engine layer that computes its product. ops: node's name -> operator, of the file."""
    by_node: dict[str, list[EngineLayer]] = {}
    for layer in engine:
        for name in layer.nodes:
            by_node.setdefault(name, []).append(layer)
    rows = []
    for node in nodes:
        found = _product(node.node, by_node.get(node.node, []))
        row = MatrixLayer(node=node.node, path=node.path, op=node.op, wanted=node.wanted, why=node.why)
        if found is not None:
            others = [n for n in found.nodes if n != node.node and n in ops and ops[n] not in UNTOLD]
            row = row.model_copy(
                update={
                    "got": _precision(found),
                    "output": found.outputs[0] if found.outputs else None,
                    "engine_layer": found.name,
                    "engine_type": found.type,
                    "fused": [Fused(node=n, op=ops[n]) for n in others],
                }
            )
        rows.append(row)
    return rows


def _product(name: str, candidates: Sequence[EngineLayer]) -> EngineLayer | None:
    """Of the engine layers that have a part of a node, the one that multiplies: others scale or convert its tensors."""
    own = re.compile(rf"{re.escape(name)}(_\d+)?_myl\d+_\d+")
    named_so = [c for c in candidates if c.type in PRODUCTS and own.fullmatch(c.name)]
    multiply = [c for kind in PRODUCTS for c in candidates if c.type == kind]
    generated = [c for c in candidates if GENERATED.search(c.name)]
    alone = candidates if len(candidates) == 1 else []  # small products are written out as sums
    return next(iter([*named_so, *multiply, *generated, *alone]), None)


def _precision(layer: EngineLayer) -> str | None:
    """The type that is multiplied: of the first input, as weights may be converted within the layer."""
    factors = [*layer.inputs, *layer.constants]
    if layer.inputs[:1] == ("int8",) and "int8" not in factors[1:]:
        return layer.outputs[0] if layer.outputs else None
    return factors[0] if factors else None
