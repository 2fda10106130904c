"""The teacher cache that a stage wants: where it lies and how large it is, before it is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import digest
from ..data import Dataset
from ..errors import EdgekdError, Problem
from ..learner import parse_objectives
from ..objectives import Objectives
from ..recipe import Recipe
from ..registry import bind
from ..teachers import FILLED_IN, Cached
from ..teachers.cached import cache_bytes, unequal, view_file
from .teaching import Teaching, cache_key, teaching

__all__ = ["Cache", "cache_of", "clashes", "default_directory"]


@dataclass(frozen=True)
class Cache:
    """A teacher cache on disk: `bytes` of all its views, of which `missing` are not there yet; `key` is whose it is."""

    directory: Path
    bytes: int
    missing: int
    key: Mapping[str, Any]


def default_directory(run: Path, key: Mapping[str, Any]) -> Path:
    """Where a run keeps a cache for which its recipe names no directory."""
    return run / ".cache" / f"teacher-{digest(key)[:12]}"


def cache_of(stage: Any, teachers: Sequence[str], recipe: Recipe, data: Dataset, run: Path) -> Cache | None:
    """The cache that a stage, checked before, will read; None where it asks no cached teacher. `teachers` are keys."""
    asked = _asked(stage)
    if asked is None:
        return None
    each = [s.objectives for s in getattr(stage, "students", []) if s.objectives is not None]
    try:
        component, args, problems = bind("teachers", asked.source.use, asked.source.args, "source", skip=FILLED_IN)
        taught = any(Objectives(parse_objectives(o)).needs_teacher for o in [asked.objectives, *each])
        if component is not Cached or problems or not taught:
            return None
        key = cache_key(recipe, data, teachers, args["of"], args["top"], getattr(stage, "heal", stage))
    except EdgekdError:
        return None  # told by the check
    directory = args["directory"] or default_directory(run, key)
    views, of_one = args["views"], cache_bytes(len(data.train), len(data.classes), 1, args["top"])
    there = sum(view_file(directory, view).exists() for view in range(views))
    return Cache(directory, views * of_one, (views - there) * of_one, key)


def clashes(cache: Cache, earlier: Mapping[str, Cache], place: str) -> Iterator[Problem]:
    """What is wrong with a cache in whose directory one of the `earlier` stages, by name, will keep other answers."""
    for name, other in earlier.items():
        if other.directory.resolve() != cache.directory.resolve():
            continue
        parts = unequal(other.key, cache.key)
        if parts:
            what = f"the stage {name!r} makes the teacher cache there with another {', '.join(parts)}"
            yield Problem(place, what, "a source with a directory of its own, or with none: then it lies in the run")
            return


def _asked(stage: Any) -> Teaching | None:
    heal = getattr(stage, "heal", None)
    if heal is not None:
        return teaching(heal) if heal.epochs else None
    found: Teaching | None = getattr(stage, "teaching", None)
    return found
