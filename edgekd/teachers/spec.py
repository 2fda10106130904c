"""A source as a recipe writes it becomes a module: what its `__init__` names is filled in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import RecipeError, UsageError
from ..recipe import Component
from ..registry import bind

__all__ = ["FILLED_IN", "asks_network", "make_source", "source_of"]

#: Parameters that a recipe does not write.
FILLED_IN = ("network", "networks", "students", "taps")


def source_of(source: Component | None, where: str) -> Callable[..., nn.Module]:
    """The component with the recipe's arguments, open for what is filled in. Raises UsageError or RecipeError."""
    source = source or Component(use="frozen")
    component, args, problems = bind("teachers", source.use, source.args, where, skip=FILLED_IN)
    if problems:
        raise RecipeError(problems)

    def made(**filled: Any) -> nn.Module:
        return component(**filled, **args)  # type: ignore[no-any-return]

    made.__signature__ = inspect.signature(component)  # type: ignore[attr-defined]
    return made


def _named(source: Callable[..., nn.Module]) -> list[str]:
    return [name for name in inspect.signature(source).parameters if name in FILLED_IN]


def asks_network(source: Callable[..., nn.Module]) -> bool:
    """Whether a source wants a trained teacher at all."""
    return bool({"network", "networks"} & set(_named(source)))


def make_source(
    source: Callable[..., nn.Module], teachers: Sequence[nn.Module], students: Sequence[nn.Module], taps: Sequence[str]
) -> nn.Module:
    """The module, given what it names. Raises UsageError for several teachers where it takes one."""
    named = _named(source)
    if "network" in named and len(teachers) != 1:
        raise UsageError(
            f"this source takes one teacher, got {len(teachers)}", where="source", hint="source = 'ensemble'"
        )
    filled: dict[str, Any] = {"networks": list(teachers), "students": list(students), "taps": list(taps)}
    if teachers:
        filled["network"] = teachers[0]
    return source(**{name: filled[name] for name in named})
