"""From a recipe's `{ use, args }` to a spec, from a spec to a network, and what pruning changed in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pydantic_core import to_jsonable_python
from torch import nn

from ..artifact import ModelSpec
from ..errors import EdgekdError, Problem, RecipeError, StageError, UsageError
from ..registry import bind, parameters, resolve
from . import ecosystem

__all__ = ["build", "changed_attributes", "specify", "without_blocks"]

#: A key such as `weight.shape` holds the new shape of that parameter or buffer.
_SHAPE = ".shape"


def specify(use: str, args: dict[str, Any], *, classes: int, size: list[int], where: str) -> ModelSpec:
    """The complete, JSON-able spec of a network for images of `size` [C, H, W] in `classes` classes.

    `num_classes`, `in_channels` and `image_size` are filled in where the component takes them and `args`
    does not name them. Raises RecipeError (all wrong arguments at once) or UsageError (no such network).
    """
    component, carried = resolve("models", use, where)
    takes = parameters(component).model_fields
    clash = [Problem(f"{where}.{key}", f"is part of the name {use!r} already") for key in carried.keys() & args.keys()]
    filled = dict(args)
    if "num_classes" in takes:
        filled.setdefault("num_classes", classes)
    if "in_channels" in takes:
        filled.setdefault("in_channels", size[0])
    if "image_size" in takes and "image_size" not in filled:
        if size[1] != size[2]:
            clash.append(
                Problem(where, f"{use} takes square images, the data set's are {size[1]}x{size[2]}", "resize the data")
            )
        filled["image_size"] = size[1]
    _, bound, problems = bind("models", use, filled, where)
    if clash or problems:
        raise RecipeError([*clash, *problems])
    if component is ecosystem.hf:
        bound = ecosystem.with_config(bound, where)
    try:
        jsonable = to_jsonable_python({key: value for key, value in bound.items() if key not in carried})
    except ValueError as error:
        raise UsageError(f"an argument of {use} cannot be written as JSON: {error}", where=where) from error
    return ModelSpec(use=use, args=jsonable)


def build(spec: ModelSpec) -> nn.Module:
    """The network of a spec, with fresh weights from torch's current random state.

    The same spec gives the same architecture, pruning (`spec.removed`, `spec.attributes`) included. Raises UsageError
    when the component fails or returns something else than a module.
    """
    where = f"model {spec.use}"
    component, bound, problems = bind("models", spec.use, spec.args, where)
    if problems:
        raise RecipeError(problems)
    try:
        network = component(**bound)
    except EdgekdError:
        raise
    except Exception as error:
        if component.__module__.startswith("edgekd."):
            raise
        raise UsageError(f"{spec.use} failed: {type(error).__name__}: {error}", where=where) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{spec.use} returned {type(network).__name__}, expected a torch.nn.Module", where=where)
    for module in network.modules():
        # In-place activations overwrite the features that objectives tap; they save memory, nothing else.
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
    without_blocks(network, spec.removed)
    _apply(network, spec.attributes)
    return network


def without_blocks(network: nn.Module, paths: Iterable[str]) -> None:
    """Put the identity in place of these modules, in `network`. Raises StageError for a path that it does not have."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        try:
            network.get_submodule(path)
        except AttributeError as error:
            raise StageError(
                f"the spec removes {path!r}, which the network does not have", hint="was the network's code changed?"
            ) from error
        setattr(network.get_submodule(owner), name, nn.Identity())


def changed_attributes(original: nn.Module, changed: nn.Module) -> dict[str, dict[str, Any]]:
    """What has to be set in `original` to make it `changed`: module path -> JSON-able attributes.

    Plain attributes (`out_channels`, `groups`, `num_features`, `num_heads`, ...) stand under their own names, the
    shapes of resized parameters and buffers under `NAME.shape`. Raises StageError when modules came or went; blocks
    that were removed are removed from `original` before (`without_blocks`).
    """
    before, after = dict(original.named_modules()), dict(changed.named_modules())
    moved = before.keys() ^ after.keys() or {p for p in before if type(before[p]) is not type(after[p])}
    if moved:
        raise StageError(
            f"the changed network has other modules than its spec builds: {', '.join(sorted(moved)[:8])}",
            hint="only sizes of layers can be recorded, not added, removed or replaced modules",
        )
    changes = {}
    for path, module in after.items():
        old, new = dict(_attributes(before[path])), dict(_attributes(module))
        missing = object()
        difference = {name: value for name, value in new.items() if old.get(name, missing) != value}
        if difference:
            changes[path] = to_jsonable_python(difference)
    return changes


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training" and _plain(value):
            yield name, value
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield name + _SHAPE, tuple(tensor.shape)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _apply(network: nn.Module, attributes: dict[str, dict[str, Any]]) -> None:
    for path, changes in attributes.items():
        try:
            module = network.get_submodule(path)
        except AttributeError as error:
            raise StageError(
                f"the spec changes {path!r}, which the network does not have", hint="was the network's code changed?"
            ) from error
        for name, value in changes.items():
            if name.endswith(_SHAPE):
                _resize(module, name.removesuffix(_SHAPE), value)
            else:
                setattr(module, name, tuple(value) if isinstance(getattr(module, name, None), tuple) else value)


def _resize(module: nn.Module, name: str, shape: list[int]) -> None:
    """Keep the leading part of a tensor, so that fresh weights keep the distribution of their initialisation."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != len(shape):
        raise StageError(f"the spec resizes {name!r} to {shape}, which the network does not have in this form")
    resized = tensor.new_zeros(shape)
    overlap = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    resized[overlap] = tensor.detach()[overlap]
    tensor.data = resized
