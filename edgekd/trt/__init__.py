"""Files for TensorRT: whether it takes them, and in which types it would run their layers."""

from __future__ import annotations

from .compiler import TARGETS, Compiled, Refusal, compile_onnx, compiler_installed, nearest_target
from .dla import dla_problems

__all__ = ["TARGETS", "Compiled", "Refusal", "compile_onnx", "compiler_installed", "dla_problems", "nearest_target"]
