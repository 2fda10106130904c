"""Files for TensorRT: whether it takes them, and in which types it would run their layers."""

from __future__ import annotations

from .build import Engine, build_engines
from .compiler import TARGETS, Compiled, Refusal, compile_onnx, compiler_installed, nearest_target
from .dla import dla_problems
from .files import TrtFile, files_of, write_files
from .half import in_half
from .plain import without_integers
from .rules import RULES, Finding, check, summarised
from .verification import MatrixLayer, Verification
from .verify import verify

__all__ = [
    "RULES",
    "TARGETS",
    "Compiled",
    "Engine",
    "Finding",
    "MatrixLayer",
    "Refusal",
    "TrtFile",
    "Verification",
    "build_engines",
    "check",
    "compile_onnx",
    "compiler_installed",
    "dla_problems",
    "files_of",
    "in_half",
    "nearest_target",
    "summarised",
    "verify",
    "without_integers",
    "write_files",
]
