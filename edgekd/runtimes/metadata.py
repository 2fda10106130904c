"""What edgekd writes into the files that it exports, beside the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["parse_metadata"]


def parse_metadata(properties: Mapping[str, str]) -> dict[str, Any]:
    """{"classes": [...], "preprocessing": {...}, "input": "float32"|"uint8", "version": ...} as far as a file says.

    {} for the properties of files that another tool wrote.
    """
    found: dict[str, Any] = {}
    for key in ("classes", "preprocessing"):
        if key in properties:
            try:
                found[key] = json.loads(properties[key])
            except ValueError:
                continue
    if "edgekd.version" in properties:
        found |= {"version": properties["edgekd.version"], "input": properties.get("input", "float32")}
    return found
