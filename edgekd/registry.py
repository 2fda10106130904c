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
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

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
    "source_digests",
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
    "rules": "edgekd.objectives",
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
    module = getattr(component, "__module__", None) or type(component).__module__
    return f"{module}.{getattr(component, '__qualname__', type(component).__qualname__)}"


def _same_origin(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    return _origin(a) == _origin(b) and inspect.getsourcefile(a) == inspect.getsourcefile(b)


@cache
def _load_kind(kind: str) -> None:
    importlib.import_module(KINDS[kind])
    for entry in importlib.metadata.entry_points(group=f"edgekd.{kind}"):
        try:
            component = entry.load()
        except Exception as error:  # somebody else's package may fail in any way
            package = entry.dist.name if entry.dist else entry.value
            raise UsageError(
                f"the installed plugin {package} failed: {type(error).__name__}: {error}",
                where=f"edgekd.{kind}",
                hint="update or uninstall it",
            ) from error
        register(kind, entry.name)(component)


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
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
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
        raise UsageError(f"no plugin file {path}", where="plugins", hint="paths start at the working directory")
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
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        del sys.modules[name]
        raise UsageError(
            f"plugin {path} failed: {type(error).__name__}: {error}",
            where="plugins",
            hint="run it by itself to see where: python " + str(path),
        ) from error


def parameters(component: Callable[..., Any], skip: tuple[str, ...] = ()) -> type[BaseModel]:
    """A pydantic model of a component's keyword parameters, unknown keys forbidden (unless it takes **kwargs).

    `skip` names the parameters that edgekd itself passes.
    """
    if inspect.isclass(component) and issubclass(component, BaseModel):
        return component
    target = component.__init__ if inspect.isclass(component) else component  # type: ignore[misc]
    try:
        return _derived(getattr(component, "__name__", "component"), target, skip)
    except Exception as error:  # annotations that name what is not there, names that pydantic does not take, ...
        raise UsageError(
            f"the signature of {_origin(component)} cannot be read: {type(error).__name__}: {error}",
            hint="annotate its parameters with types that its module imports, and begin no name with an underscore",
        ) from error


def _derived(name: str, target: Callable[..., Any], skip: tuple[str, ...]) -> type[BaseModel]:
    hints = get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    extra: Any = "forbid"
    for key, p in inspect.signature(target).parameters.items():
        if key == "self" or key in skip or p.kind is p.VAR_POSITIONAL:
            continue
        if p.kind is p.VAR_KEYWORD:
            extra = "allow"
            continue
        fields[key] = (hints.get(key, Any), Field(... if p.default is p.empty else p.default))
    config = ConfigDict(extra=extra, arbitrary_types_allowed=True, protected_namespaces=())
    with warnings.catch_warnings():
        # A parameter may be called `copy` or `schema`: nobody calls those methods of this model.
        warnings.filterwarnings("ignore", message="Field name .* shadows", category=UserWarning)
        return create_model(name, __config__=config, **fields)  # type: ignore[no-any-return]


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
    found: dict[str, list[Problem]] = {}
    for e in error.errors():
        keys = e["loc"][-1:] if e["type"] == "extra_forbidden" else ()  # the user's own word, whatever it looks like
        loc = (*(part for part in e["loc"][: len(e["loc"]) - len(keys)] if not _is_branch(part)), *keys)
        place = where
        for part in loc:
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
        found.setdefault(place, []).append(_problem(e, place, loc, model))
    return [_merged(alternatives) for alternatives in found.values()]


def _is_branch(part: Any) -> bool:
    """Whether pydantic put this into a path to tell which member of a union failed."""
    return isinstance(part, str) and (part in ("bool", "int", "float", "str", "none", "Component") or "[" in part)


def _merged(alternatives: list[Problem]) -> Problem:
    """The members of a union fail one by one; together they are one problem."""
    first = alternatives[0]
    if len(alternatives) == 1:
        return first
    heads = dict.fromkeys(p.what.rpartition(", got ")[0] or p.what for p in alternatives)
    got = first.what.rpartition(", got ")[2]
    return Problem(first.where, f"{', or '.join(heads)}, got {got}", first.hint)


def _problem(e: Any, place: str, loc: tuple[Any, ...], model: type[BaseModel] | None) -> Problem:
    if e["type"] == "extra_forbidden":
        known = _fields_of(model, loc[:-1]) if model else []
        return Problem(place, "unknown key", nearest(str(loc[-1]), known))
    field = _field_at(model, loc) if model else None
    about = field.description if field else None
    if e["type"] == "missing":
        return Problem(place, "missing: this key is required", about)
    what = "must be a table" if e["type"] in ("model_type", "dict_type") else e["msg"].removeprefix("Value error, ")
    return Problem(place, f"{what[0].lower()}{what[1:]}, got {_short(e['input'])}", about)


def _field_at(model: type[BaseModel], loc: tuple[Any, ...]) -> Any:
    """The field that a path leads to; None where it leads out of the models."""
    current: Any = model
    field = None
    keyed = False
    for part in loc:
        if isinstance(part, int):
            continue
        if keyed:  # the key of a table whose keys are the user's
            keyed = False
            continue
        if current is None:
            return None
        field = current.model_fields.get(part)
        current = _model_within(field.annotation) if field else None
        keyed = field is not None and get_origin(field.annotation) is dict
    return field


def _fields_of(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    field = _field_at(model, loc)
    inner = _model_within(field.annotation) if field else model if not loc else None
    return list(inner.model_fields) if inner is not None else []


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
    """The first sentence of a component's docstring, on one line."""
    first = " ".join((inspect.getdoc(component) or "").partition("\n\n")[0].split())
    ends = re.search(r"[.!?](?=\s+[A-Z`])", first)
    return first[: ends.end()] if ends else first


def source_digest(use: str) -> str | None:
    """sha256 of the file of `package.module` where `use` is `package.module:function`; None for registered names."""
    module, colon, _ = use.partition(":")
    if not colon or not module:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # not there: whoever resolves it says so
        return None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def source_digests(value: Any) -> Iterator[str]:
    """sha256 of the module behind every `use = "package.module:function"` in nested tables and lists."""
    if isinstance(value, dict):
        use = value.get("use")
        found = source_digest(use) if isinstance(use, str) else None
        if found is not None:
            yield found
        for inner in value.values():
            yield from source_digests(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from source_digests(inner)
