"""The gate's verdicts as JUnit XML: one suite a profile, one case a rule. What CI servers show beside tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from ..bench.results import Results
from .model import VerdictLike

__all__ = ["junit"]

#: What XML 1.0 cannot hold, escaped or not.
FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(results: Results, verdicts: Sequence[VerdictLike]) -> str:
    """A failed rule is a failure; an inconclusive one is an error, so that no server takes it for a pass."""
    root = ElementTree.Element("testsuites", {"name": _legal(f"edgekd {results.name}"), **_counts(verdicts)})
    for profile in dict.fromkeys(v.profile for v in verdicts):
        own = [v for v in verdicts if v.profile == profile]
        facts = {"name": _legal(profile), **_counts(own), "skipped": "0", "time": "0"}
        suite = ElementTree.SubElement(root, "testsuite", facts)
        for v in own:
            case = ElementTree.SubElement(
                suite, "testcase", classname=_legal(f"edgekd.{profile}"), name=_legal(v.rule), time="0"
            )
            told = _legal(f"allowed {v.allowed}, found {v.shown}")
            if v.verdict != "pass":
                kind = "failure" if v.verdict == "fail" else "error"
                message = told if v.verdict == "fail" else f"inconclusive: {told}"
                problem = ElementTree.SubElement(case, kind, message=message, type=v.verdict)
                problem.text = _legal("\n".join(filter(None, (f"{v.variant}: {told}", v.hint and f"hint: {v.hint}"))))
            ElementTree.SubElement(case, "system-out").text = _legal(f"{v.variant}: {told}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counts(verdicts: Sequence[VerdictLike]) -> dict[str, str]:
    found = [v.verdict for v in verdicts]
    return {
        "tests": str(len(found)), "failures": str(found.count("fail")), "errors": str(found.count("inconclusive"))
    }  # fmt: skip


def _legal(text: str) -> str:
    return FORBIDDEN.sub("�", text)
