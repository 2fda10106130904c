"""Components by name: what a recipe's `{ use = "name", ... }` refers to.

A component is a class or function. Its signature is its schema: the parameters' annotations and defaults
become a pydantic model, from which validation, the JSON schema and `edgekd show NAME` follow.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from .errors import Problem, UsageError, nearest

__all__ = [
    "KINDS",
    "bind",
    "load_plugin",
    "names",
    "parameters",
    "register",
    "resolve",
    "source_digest",
    "summary",
    "unregister",
    "validation_problems",
]

#: kind -> the package whose import registers what edgekd ships; also the entry-point group `edgekd.<kind>`.
KINDS = {
    "augmentations": "edgekd.data",
    "data": "edgekd.data",
    "models": "edgekd.models",
    "objectives": "edgekd.objectives",
    "runtimes": "edgekd.runtimes",
    "stages": "edgekd.stages",
    "tasks": "edgekd.tasks",
    "teachers": "edgekd.teachers",
}

_T = TypeVar("_T", bound=Callable[..., Any])
_components: dict[tuple[str, str], Callable[..., Any]] = {}


def register(kind: str, name: str) -> Callable[[_T], _T]:
    """Decorator: make a class or function known to recipes as `name`.

    A name that ends in a colon is a family: `timm:` serves `use = "timm:resnet18"` with `name="resnet18"`.
    Raises UsageError when the name is taken.
    """

    def add(component: _T) -> _T:
        taken = _components.get((kind, name))
        if taken is not None and not _same_origin(taken, component):
            raise UsageError(
                f"two {kind} are called {name!r}: {_origin(taken)} and {_origin(component)}", hint="rename one of them"
            )
        _components[kind, name] = component
        return component

    return add


def unregister(kind: str, name: str) -> None:
    """Forget a component (for tests and notebooks that register their own)."""
    _components.pop((kind, name), None)


def _origin(component: Callable[..., Any]) -> str:
    return f"{component.__module__}.{component.__qualname__}"


def _same_origin(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    return _origin(a) == _origin(b) and inspect.getsourcefile(a) == inspect.getsourcefile(b)


@cache
def _load_kind(kind: str) -> None:
    importlib.import_module(KINDS[kind])
    for entry in importlib.metadata.entry_points(group=f"edgekd.{kind}"):
        register(kind, entry.name)(entry.load())


def names(kind: str) -> list[str]:
    """All known names of a kind, sorted. Imports what registers them (torch included)."""
    _load_kind(kind)
    return sorted(n for k, n in _components if k == kind)


def resolve(kind: str, use: str, where: str = "") -> tuple[Callable[..., Any], dict[str, Any]]:
    """The component called `use` and the arguments that its name carries.

    `use` is a registered name, `family:rest`, or `package.module:function`.
    Raises UsageError with the nearest name when there is none.
    """
    _load_kind(kind)
    if (kind, use) in _components:
        return _components[kind, use], {}
    family, colon, rest = use.partition(":")
    if colon and (kind, family + ":") in _components:
        return _components[kind, family + ":"], {"name": rest}
    if colon:
        return _import(use, where), {}
    raise UsageError(f"no {kind} called {use!r}", where=where, hint=nearest(use, names(kind)))


def _import(use: str, where: str) -> Callable[..., Any]:
    module_name, _, attribute = use.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way
        raise UsageError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error}",
            where=where,
            hint=f"is it importable from {Path.cwd()}? try: python -c 'import {module_name}'",
        ) from error
    component = getattr(module, attribute, None)
    if not callable(component):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"{module_name} has no function {attribute!r}", where=where, hint=nearest(attribute, known))
    return component  # type: ignore[no-any-return]


def load_plugin(path: Path) -> None:
    """Import a local Python file that registers components. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"no plugin file {path}", where="plugins", hint="paths are relative to the recipe")
    name = f"edgekd_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UsageError:
        del sys.modules[name]
        raise
    except Exception as error:  # the user's module may fail in any way
        del sys.modules[name]
        raise UsageError(f"plugin {path} failed: {type(error).__name__}: {error}", where="plugins") from error


def parameters(component: Callable[..., Any], skip: tuple[str, ...] = ()) -> type[BaseModel]:
    """A pydantic model of a component's keyword parameters, unknown keys forbidden (unless it takes **kwargs).

    `skip` names the parameters that edgekd itself passes.
    """
    if inspect.isclass(component) and issubclass(component, BaseModel):
        return component
    target = component.__init__ if inspect.isclass(component) else component  # type: ignore[misc]
    hints = get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    extra: Any = "forbid"
    for name, p in inspect.signature(target).parameters.items():
        if name == "self" or name in skip or p.kind is p.VAR_POSITIONAL:
            continue
        if p.kind is p.VAR_KEYWORD:
            extra = "allow"
            continue
        fields[name] = (hints.get(name, Any), Field(... if p.default is p.empty else p.default))
    config = ConfigDict(extra=extra, arbitrary_types_allowed=True)
    return create_model(component.__name__, __config__=config, **fields)  # type: ignore[no-any-return]


def bind(
    kind: str, use: str, args: dict[str, Any], where: str = "", skip: tuple[str, ...] = ()
) -> tuple[Callable[..., Any], dict[str, Any], list[Problem]]:
    """Resolve a component and validate its arguments: (component, all arguments with defaults, problems)."""
    component, carried = resolve(kind, use, where)
    model = parameters(component, skip)
    try:
        valid = model.model_validate({**carried, **args})
    except ValidationError as error:
        return component, {}, validation_problems(error, where, model)
    bound = {name: getattr(valid, name) for name in model.model_fields} | (valid.model_extra or {})
    return component, bound, []


def validation_problems(error: ValidationError, where: str, model: type[BaseModel] | None = None) -> list[Problem]:
    """Pydantic's errors as problems with a path such as `stage[1].target.macs` and a hint."""
    problems = []
    for e in error.errors():
        place = where
        for part in e["loc"]:
            if isinstance(part, int):
                place += f"[{part}]"
            elif not part.startswith(("function-", "tagged-union", "union")):
                place += f".{part}" if place else part
        if e["type"] == "extra_forbidden":
            known = _fields_at(model, e["loc"][:-1]) if model else []
            problems.append(Problem(place, "unknown key", nearest(str(e["loc"][-1]), known)))
        elif e["type"] == "missing":
            problems.append(Problem(place, "missing: this key is required"))
        else:
            what = e["msg"].removeprefix("Value error, ")
            problems.append(Problem(place, f"{what[0].lower()}{what[1:]}, got {_short(e['input'])}"))
    return problems


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in loc:
        if isinstance(part, int) or not (inspect.isclass(current) and issubclass(current, BaseModel)):
            continue
        field = current.model_fields.get(part) or next(
            (f for f in current.model_fields.values() if f.alias == part), None
        )
        current = _model_within(field.annotation) if field else None
    return list(current.model_fields) if inspect.isclass(current) and issubclass(current, BaseModel) else []


def _model_within(annotation: Any) -> Any:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_within(inner)
        if found is not None:
            return found
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def summary(component: Callable[..., Any]) -> str:
    """The first line of a component's docstring."""
    return (inspect.getdoc(component) or "").partition("\n")[0]


def source_digest(component: Callable[..., Any]) -> str | None:
    """sha256 of the file a component comes from; None for edgekd's own (its version is in every key already)."""
    if component.__module__.startswith("edgekd."):
        return None
    file = inspect.getsourcefile(component)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
