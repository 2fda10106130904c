"""ONNX files as they lie on the disk: read one, and say which module of a network a node was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import UsageError

__all__ = ["module_path", "read_onnx"]


def read_onnx(path: Path) -> Any:
    """Parse an ONNX file, its weights included. Raises UsageError when it is missing, truncated, or something else."""
    import onnx
    import onnx.external_data_helper
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        hint = "name an .onnx file, or a run or stage whose files are meant"
        raise UsageError(f"no ONNX file at {path}: {error.strerror or error}", hint=hint) from error
    except (DecodeError, ValueError) as error:
        raise UsageError("not an ONNX file, or a truncated one", where=str(path), hint="export it again") from error
    if not model.graph.node or not model.opset_import:
        raise UsageError("not an ONNX file, or a truncated one", where=str(path), hint="export it again")
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        what = f"its weights, in a file of their own, cannot be read: {str(error).splitlines()[0]}"
        raise UsageError(what, where=str(path), hint=f"copy that file into {path.parent}, whole") from error
    return model


def module_path(node: Any, weight: str, ours: bool) -> str | None:
    """The module that a NodeProto was, as far as the file has it: in the node's name, the weight's, or in notes.

    weight: the tensor that holds its weight, "" without one; ours: whether edgekd wrote the file.
    """
    called = str(node.name)
    if ours and called and not called.startswith("node_"):
        return called
    match = re.fullmatch(r"(?P<path>.+)\.(?:weight|kernel)(?:_quantized|_q)?", weight)
    if match:
        return match["path"]
    notes = {p.key: p.value for p in node.metadata_props}
    scopes = re.findall(r"'([^']*)'", notes.get("pkg.torch.onnx.name_scopes", ""))
    if len(scopes) > 1 and scopes[-2]:
        return str(scopes[-2])
    # PyTorch's older exporter: /layer1/layer1.0/conv1/Conv
    parts = called.split("/")[1:-1] if called.startswith("/") else []
    return (
        ".".join([p for i, p in enumerate(parts) if not parts[i + 1 : i + 2] or not parts[i + 1].startswith(f"{p}.")])
        or None
    )
