"""What a component takes, where it comes from and how a recipe uses it, in words for a screen."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .recipe import Component

__all__ = ["DISTILLED", "documented", "kind_of", "parameter_rows", "snippet"]

LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "a multiple of"}
#: Kinds whose components stand in the stage `distill`: their snippets are lines of its table.
DISTILLED = {
    "objectives": 'objectives = ["ce", {component}]',
    "teachers": 'objectives = ["ce", "kl"]\nsource = {component}',
    "rules": 'objectives = ["ce", {{ use = "kl", weight = {component} }}]',
}


def kind_of(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """An annotation as a recipe's author reads it: `float > 0`, `"mean" or "fixed"`, `list of str`."""
    metadata = list(metadata)
    for note in metadata:
        written = getattr(note, "json_schema_input_type", PydanticUndefined)
        if written not in (PydanticUndefined, Any):  # what a recipe may write, before a validator makes it a list
            annotation = written
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(args[0], [*_unpacked(args[1:]), *metadata])
    limits = [f"{sign} {_number(getattr(m, key))}" for m in metadata for key, sign in LIMITS.items() if hasattr(m, key)]
    limits = [limit for limit in limits if not limit.endswith(" None")]
    return " ".join([_bare(annotation, origin, args), " and ".join(limits)]).strip()


def _unpacked(notes: Iterable[Any]) -> Iterable[Any]:
    for note in notes:
        yield from note.metadata if isinstance(note, FieldInfo) else [note]


def _bare(annotation: Any, origin: Any, args: tuple[Any, ...]) -> str:
    if origin is Literal:
        return _either(json.dumps(value) for value in args)
    if origin in (Union, types.UnionType):
        return _either(kind_of(a) for a in args if a is not type(None))
    if origin in (list, tuple, set):
        return f"list of {kind_of(args[0])}" if args and args[0] is not Any else "list"
    if origin is dict or annotation is dict:
        return "table"
    if annotation is Any:
        return "anything"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        keys = ["use = ..." if key == "use" and issubclass(annotation, Component) else key for key in _keys(annotation)]
        return f"{{ {', '.join(keys)} }}" if len(keys) < 6 else "table"
    return "path" if annotation is Path else str(getattr(annotation, "__name__", annotation))


def _keys(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _either(parts: Iterable[str]) -> str:
    *first, last = dict.fromkeys(parts)
    return f"{', '.join(first)} or {last}" if first else last


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parameter_rows(fields: dict[str, FieldInfo]) -> list[str]:
    """One line for each parameter: name, type, default, what it is."""
    return [_row(name, field) for name, field in fields.items()]


def _row(name: str, field: FieldInfo) -> str:
    about = field.description or _within(field.annotation)
    note = f": {about}" if about else ""
    return f"{name} ({kind_of(field.annotation, field.metadata)}, {_default(field)}){note}"


def _within(annotation: Any) -> str | None:
    """What a member of a union is described as: `Tap | None` is a tap."""
    notes = [m for a in get_args(annotation) if get_origin(a) is Annotated for m in get_args(a)[1:]]
    return next((m.description for m in notes if isinstance(m, FieldInfo) and m.description), None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Component) and not value.args:
        value = value.use
    if value is None or isinstance(value, BaseModel) or value in ([], {}, ()):
        return "optional"
    return f"default {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) and value != round(value, 6) else json.dumps(value, default=str)


def documented(component: Callable[..., Any]) -> tuple[str, str, str]:
    """A component's description, its source (the paragraph `Source: ...` of its docstring) and where it lives."""
    paragraphs = (inspect.getdoc(component) or "").split("\n\n")
    sources = [" ".join(p.split()).removeprefix("Source: ") for p in paragraphs if p.startswith("Source: ")]
    text = "\n\n".join(p for p in paragraphs if not p.startswith("Source: "))
    return text, re.sub(r"\.$", "", "; ".join(sources)), f"{component.__module__}:{component.__qualname__}"


def snippet(kind: str, name: str, component: Callable[..., Any], fields: dict[str, FieldInfo]) -> str:
    """How a recipe uses it: lines of a `[[stage]]` table of `distill` for its parts, `{ use = ... }` for others.

    A component may bring its own as an attribute `snippet`; otherwise required parameters take their first example.
    """
    own = getattr(component, "snippet", None)
    if isinstance(own, str):
        return own
    required = [f"{n} = {_toml(f.examples[0]) if f.examples else '...'}" for n, f in fields.items() if f.is_required()]
    written = "{ " + ", ".join([f'use = "{name}"', *required]) + " }"
    return DISTILLED.get(kind, "{component}").format(component=written)
