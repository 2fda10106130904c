"""An ONNX file, ours or not, read for explaining: checked, its functions inlined, every node with a name of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..errors import UsageError, nearest

__all__ = ["read_model", "tag", "tagged"]

#: Operator sets that ONNX Runtime's CPU build brings beside ONNX's own.
RUNTIME_DOMAINS = {"com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", "com.microsoft.experimental"}
STANDARD = {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"}
#: protobuf's limit on one file.
LARGEST = 2**31 - 1


def read_model(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file with its weights, and inline its functions.

    Raises UsageError: no such file, not ONNX, weights beside it that are missing or too short, or operators that
    ONNX Runtime does not have (each with its domain).
    """
    where, again = str(path), "compare its size with the original, or export it again"
    if path.is_dir():
        raise UsageError("is a directory, expected an .onnx file", where=where)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UsageError(
            f"no ONNX file there: {error.strerror or error}", where=where, hint="expected the path of an .onnx file"
        ) from error
    except (DecodeError, ValueError) as error:
        raise UsageError("not an ONNX file, or a truncated one", where=where, hint=again) from error
    if not model.graph.node or not model.opset_import:
        raise UsageError("not an ONNX file, or a truncated one", where=where, hint=again)
    _load_external(model, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_operators(model, where)
    return model


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    for tensor in model.graph.initializer:
        place = {e.key: e.value for e in tensor.external_data}
        if not place.get("location"):
            continue
        file = path.parent / place["location"]
        if not file.is_file():
            raise UsageError(
                f"its weights are missing: {tensor.name!r} lies in {place['location']}, which is not beside it",
                where=str(path),
                hint=f"copy {place['location']} into {path.parent}",
            )
        needed = int(place.get("offset", 0)) + int(place.get("length", 0))
        if file.stat().st_size < needed:
            what = f"{place['location']} has {file.stat().st_size:,} bytes, {tensor.name!r} ends at byte {needed:,}"
            raise UsageError(f"its weights are truncated: {what}", where=str(path), hint="copy both files again")
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise UsageError(f"its weights cannot be read: {error}", where=str(path)) from error


def _check_operators(model: onnx.ModelProto, where: str) -> None:
    versions = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    unknown: dict[str, str] = {}
    for node in _nodes(model.graph):
        if node.domain in RUNTIME_DOMAINS:
            continue
        if node.domain not in STANDARD:
            unknown[node.op_type] = f"of domain {node.domain!r}"
        elif not onnx.defs.has(
            node.op_type,
            versions.get(node.domain or "ai.onnx", 1),
            node.domain.replace("ai.onnx", "") if node.domain == "ai.onnx" else node.domain,
        ):
            unknown[node.op_type] = f"of opset {versions.get(node.domain or 'ai.onnx', 'none')}"
    if unknown:
        listed = ", ".join(f"{op} {domain}" for op, domain in sorted(unknown.items()))
        known = {s.name for s in onnx.defs.get_all_schemas()}
        raise UsageError(
            f"ONNX Runtime has no operator {listed}",
            where=where,
            hint="export it with ONNX's own operators; custom ones are part of the runtime they were written for"
            if any("domain" in d for d in unknown.values())
            else nearest(next(iter(unknown)), known),
        )


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _nodes(inner)


def tag(index: int) -> str:
    """The name that node number `index` of the graph gets in `tagged`."""
    return f"edgekd{index:06d}node"


def tagged(model: onnx.ModelProto, path: Path) -> bool:
    """Write a copy with numbered nodes, so that each can be recognised in what the runtime makes of it.

    False, and nothing written, for a model that is too large for one file.
    """
    if model.ByteSize() > LARGEST:
        return False
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for index, node in enumerate(copy.graph.node):
        node.name = tag(index)
    onnx.save(copy, path)
    return True
