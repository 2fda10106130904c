"""The recipe: one TOML file that says everything about a run. No torch here.

Components (`{ use = "name", ... }`) are kept as written; `pipeline.plan` resolves them through the registry.
Relative paths in a recipe are relative to the working directory, so that the copy inside a run reproduces it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import Problem, RecipeError, UsageError
from .registry import validation_problems
from .shipped import shipped
from .toml_text import pairs

__all__ = [
    "Axis",
    "Component",
    "DataSpec",
    "Normalize",
    "Recipe",
    "Search",
    "Training",
    "assign",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
    "to_toml",
]


class Component(BaseModel):
    """`{ use = "name", **args }`, or just `"name"`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str = Field(min_length=1, description="a registered name, family:name, or package.module:function")

    @property
    def args(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    return {"use": value} if isinstance(value, str) else value


#: A component that may be written as a bare name.
ComponentField = Annotated[Component, BeforeValidator(_named, json_schema_input_type=Component | str)]


class Normalize(BaseModel):
    """Per-channel mean and standard deviation of inputs scaled to [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: list[float] = Field(min_length=1)
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)


class DataSpec(Component):
    """The data set and how batches are made of it; keys beside these go to the data component."""

    batch: int = Field(128, gt=0, description="training batch size")
    augment: list[ComponentField] = Field(default_factory=list, description="augmentations, in order")
    normalize: Normalize | None = Field(None, description="default: the data set's own figures")
    validation: float = Field(0.1, ge=0, lt=1, description="share of the training images held out; 0 for none")

    @field_validator("augment", mode="before", json_schema_input_type=Component | str | list[Component | str] | None)
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [] if value in (None, "none") else [value]


class Training(BaseModel):
    """How the one training loop runs: the same keys for every stage that trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int = Field(10, ge=0, description="how often all training images are seen")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD (Nesterov)")
    weight_decay: float = Field(5e-4, ge=0, description="on weights only, not on biases and norms")
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    warmup: float = Field(0.2, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm")
    ema: float | None = Field(None, gt=0, lt=1, description="decay per step of the averaged weights")
    patience: int | None = Field(None, gt=0, description="stop after so many epochs without a better headline metric")
    keep: Literal["best", "last"] = Field("best", description="which epoch's weights remain (best on validation)")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpoint_s: float = Field(30.0, ge=0, description="seconds between checkpoints inside an epoch")


class Axis(BaseModel):
    """What a search may set a field to: everything from `low` to `high`, or one of `choices` (any TOML values).

    Whole numbers where both ends are whole numbers: `low = 1.0` asks for real ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: StrictInt | StrictFloat | None = None
    high: StrictInt | StrictFloat | None = None
    log: bool = Field(False, description="whether factors count instead of differences")
    step: StrictInt | StrictFloat | None = Field(None, gt=0, description="distance of the values, from `low` on")
    choices: list[Any] | None = Field(None, min_length=1, description="the values to choose from")

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _sound(self) -> Axis:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise ValueError("choices stand alone, without low, high, log and step")
            texts = [json.dumps(choice, sort_keys=True) for choice in self.choices]
            if len(set(texts)) < len(texts):
                raise ValueError("two choices are the same")
        elif self.low is None or self.high is None:
            raise ValueError("must be { low = 0.01, high = 0.5, log = true } or a list of choices")
        elif not self.low < self.high:
            raise ValueError("low must be below high")
        elif self.log and self.low <= 0:
            raise ValueError("low must be above 0 for log = true")
        elif self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        return self


def _flat(value: Any) -> Any:
    """Fields by their paths: a path without quotes is nested tables in TOML."""
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner and not {"low", "high", "choices"} & inner.keys():
            found |= {f"{key}.{rest}": axis for rest, axis in _flat(inner).items()}
        else:
            found[key] = inner
    return found


class Search(BaseModel):
    """What `edgekd search` tries out; nothing else reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    fields: Annotated[
        dict[str, Axis], BeforeValidator(_flat, json_schema_input_type=dict[str, Axis | list[Any] | dict[str, Any]])
    ] = Field(
        default={}, description='"stage.distill.lr" = { low = 0.01, high = 0.5, log = true }, or a list of choices'
    )
    trials: int = Field(20, gt=0, description="how many, pruned ones and those of all workers included")
    stage: str | None = Field(None, description="the stage whose result is judged; default: the last distill")
    metric: str | None = Field(None, description="on the validation split; default: the task's headline")
    sampler: Literal["tpe", "random"] = Field("tpe", description="tpe learns from the trials so far (Bergstra 2011)")
    pruner: Literal["median", "none"] = Field("median", description="median stops what is below the median trial")


class Recipe(BaseModel):
    """One run of edgekd."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = Field(description="the recipe format: version = 1")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the directory under runs/")
    seed: int = Field(0, ge=0, description="what everything random follows from")
    data: DataSpec = Field(description='the data set: data = { use = "digits" }; see `edgekd list data`')
    task: ComponentField = Component(use="classification")
    profiles: list[str] = Field(default=["cpu-x86"], min_length=1, description="see `edgekd list profiles`")
    plugins: list[str] = Field(default_factory=list, description="Python files that register components")
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list, description="where trainings are logged beside metrics.jsonl; needs edgekd[track]"
    )
    teacher: list[dict[str, Any]] = Field(
        min_length=1, description="the stage `teacher`: model, weights or epochs; several as [[teacher]]"
    )
    stage: list[ComponentField] = Field(default_factory=list, description="one [[stage]] table each, in order")
    gate: dict[str, Any] = Field(default_factory=dict, description="rules; [gate.PROFILE] overrides")
    search: Search | None = Field(None, description="what `edgekd search` tries out")

    @field_validator("teacher", mode="before", json_schema_input_type=dict[str, Any] | list[dict[str, Any]])
    @classmethod
    def _one_teacher_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value


def find_recipe(path: str | Path) -> Path:
    """A recipe's path: as given, or the name of one that edgekd ships. Raises UsageError."""
    given = Path(path)
    if given.is_file():
        return given
    if given.is_dir():
        raise UsageError(f"{given} is a directory", where="recipe", hint=f"did you mean {given / 'recipe.toml'}?")
    own = shipped("recipes") / f"{given.name.removesuffix('.toml')}.toml"
    if own.is_file() and given.parent in (Path(), Path("recipes")):
        return own
    known = ", ".join(sorted(p.stem for p in own.parent.glob("*.toml")))
    raise UsageError(f"no recipe {given}", where="recipe", hint=f"write one with `edgekd init`; shipped: {known}")


def _numbered(uses: Sequence[Any]) -> list[str]:
    """Names of a list's entries as the plan gives them to stages: `prune`, and `prune-2` for the second one."""
    return [str(use) if use not in uses[:i] else f"{use}-{uses[:i].count(use) + 1}" for i, use in enumerate(uses)]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides. Raises UsageError or RecipeError (all problems at once)."""
    file = find_recipe(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "texts need quotes, tables need { } and lists need [ ]"
        raise UsageError(f"not valid TOML: {error}", where=str(file), hint=hint) from error
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror}", where=str(file), hint="look at its permissions"
        ) from error
    return parse_recipe(table, overrides)


def parse_recipe(table: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from its table. Raises RecipeError with every problem found."""
    table = json.loads(json.dumps(table, default=str))  # a copy, and JSON all the way down
    for override in overrides:
        apply_override(table, override)
    table = json.loads(json.dumps(table, default=str))
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(validation_problems(error, "", Recipe)) from error


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in a table; stages are addressed by name or index (`stage.distill.epochs=3`)."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise UsageError(f"--set wants key=value, got {override!r}", hint="for example --set stage.distill.epochs=3")
    assign(table, path.strip(), parse_value(text.strip()))


def assign(table: dict[str, Any], path: str, value: Any) -> None:
    """Set the key at `a.b.c` in a recipe's table. Raises RecipeError where the path leads nowhere."""
    keys = path.split(".")
    if not all(keys):
        raise RecipeError([Problem(path, "is not the path of a key", "for example stage.distill.lr")])
    current: Any = table
    for depth, key in enumerate(keys[:-1]):
        current = _step(current, key, ".".join(keys[: depth + 1]))
    if isinstance(current, list):
        what = "names an entry of a list, not a key in it"
        raise RecipeError([Problem(path, what, f"add a key ({path}.KEY=VALUE), or set the whole list")])
    current[keys[-1]] = value


def parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _step(current: Any, key: str, path: str) -> Any:
    if isinstance(current, list):
        uses = _numbered([c.get("use") if isinstance(c, dict) else c for c in current])
        if key.isdigit() and int(key) < len(current):
            index = int(key)
        elif key in uses:
            index = uses.index(key)
        else:
            hint = f"there are: {', '.join(uses)}" if uses else "the list is empty"
            raise RecipeError([Problem(path, f"no such entry, got {key!r}", hint)])
        if isinstance(current[index], str):
            current[index] = {"use": current[index]}
        if not isinstance(current[index], dict):
            raise RecipeError([Problem(path, f"is not a table, got {current[index]!r}", "set the whole list")])
        return current[index]
    if isinstance(current.get(key), str):
        current[key] = {"use": current[key]}
    value = current.setdefault(key, {})
    if not isinstance(value, dict | list):
        raise RecipeError([Problem(path, f"is not a table, got {value!r}", "set the key itself")])
    return value


def to_toml(recipe: Recipe) -> str:
    """A recipe as TOML: what `load_recipe` reads back to an equal recipe."""
    table = recipe.model_dump(mode="json", exclude_none=True)
    teacher, stages, gate = table.pop("teacher"), table.pop("stage"), table.pop("gate")
    search = table.pop("search", None)
    opening = "[teacher]\n" if len(teacher) == 1 else "[[teacher]]\n"
    blocks = [pairs(table), *(opening + pairs(one) for one in teacher)]
    blocks += ["[[stage]]\n" + pairs(stage) for stage in stages]
    if gate:
        blocks.append("[gate]\n" + pairs(gate))
    if search:
        blocks.append("[search]\n" + pairs(search))
    return "\n\n".join(blocks) + "\n"
