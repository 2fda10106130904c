"""Reports: pure renderings of one results document and its gate verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, assert_never, get_args

from ..bench.results import Results
from .model import VerdictLike, prepare

__all__ = ["FORMATS", "Format", "render"]

Format = Literal["html", "md", "text", "json", "junit", "csv", "github-benchmark"]
FORMATS: tuple[Format, ...] = get_args(Format)
SCHEMA = 1


def render(results: Results, verdicts: Sequence[VerdictLike], format: Format) -> str:
    """The report as one self-contained HTML page, as Markdown for a pull request, as text, or for other programs."""
    match format:
        case "html":
            from .html import html

            return html(prepare(results, verdicts))
        case "md":
            from .markdown import markdown

            return markdown(prepare(results, verdicts))
        case "text":
            from .terminal import terminal

            return terminal(prepare(results, verdicts))
        case "json":
            return as_json(results, verdicts)
        case "junit":
            from .junit import junit

            return junit(results, verdicts)
        case "csv":
            from .sheet import as_csv

            return as_csv(results)
        case "github-benchmark":
            from .sheet import benchmark_json

            return benchmark_json(results)
        case _:
            assert_never(format)


def as_json(results: Results, verdicts: Sequence[VerdictLike]) -> str:
    """`{schema_version, results, verdicts, files}`: results.json and gate.json, and which file is each profile's."""
    keys = (
        "profile", "variant", "rule", "verdict", "origin", "limit", "allowed", "found", "low", "high", "shown", "hint",
    )  # fmt: skip
    table = {
        "schema_version": SCHEMA,
        "results": json.loads(results.model_dump_json()),
        "verdicts": [{key: getattr(v, key) for key in keys} for v in verdicts],
        "files": {p.profile: p.variants[-1].file for p in results.profiles if p.variants},
    }
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"
