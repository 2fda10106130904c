"""Plain values as TOML, which the standard library only reads."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["pairs"]


def pairs(table: dict[str, Any]) -> str:
    """A line `key = value` for each entry, tables within it inline; None, which TOML has not, is left out."""
    return "\n".join(f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value) if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    # JSON's escapes are TOML's, but for the one control character that JSON lets through.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
