"""What TensorRT refuses in an ONNX file, and what it silently leaves in float, said without any compiler.

Works on any ONNX file, edgekd's or not. The rules are listed in `findings.py`, with where each was seen.
"""

from __future__ import annotations

import re

import onnx.inliner
from onnx import ModelProto

from ..errors import UsageError
from .findings import RULES, Finding, Rule, Severity, summarised
from .graph import graphs
from .integers import integer_findings
from .operators import file_findings, operator_findings
from .placement import placement_findings

__all__ = ["RULES", "Finding", "Rule", "Severity", "check", "summarised"]

#: For the newest TensorRT that the rules know.
NEWEST = (11,)


def check(model: ModelProto, tensorrt: str | None = None) -> list[Finding]:
    """Judge a file by every rule, for one TensorRT version ("8.6", "10.3"); None: for the newest.

    What is refused comes first, then what stays float, then notes, each in the order of the graph. A file without
    findings may still be refused: rules know less than a compiler. Raises UsageError for what is no version.
    """
    version = _version(tensorrt)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    all_graphs = graphs(model)
    findings = list(file_findings(model, all_graphs[0], version))
    for graph in all_graphs:
        findings += operator_findings(graph, version)
        findings += integer_findings(graph, version)
        findings += placement_findings(graph)
    order = ("refused", "float", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _version(tensorrt: str | None) -> tuple[int, ...]:
    if tensorrt is None:
        return NEWEST
    if not re.fullmatch(r"\d+(\.\d+)*", tensorrt):
        raise UsageError(
            f"expected a TensorRT version such as 10.3, got {tensorrt!r}", where="tensorrt", hint="8.6, 10.3, 11"
        )
    return tuple(int(part) for part in tensorrt.split("."))
