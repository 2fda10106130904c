"""Commands that run one stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .app import (
    DataOption,
    JsonOption,
    ModelOption,
    OutOption,
    RecipeArgument,
    SetOption,
    SourceArgument,
    WeightsOption,
    app,
    print_json,
    print_text,
)
from .chain import run_recipe

if TYPE_CHECKING:
    from ..artifact import Artifact


class Backend(StrEnum):
    """Choices of --backend, as `exporting.deliver` takes them."""

    tensorrt = "tensorrt"
    torch_tensorrt = "torch-tensorrt"


@app.command()
def teacher(
    recipe: RecipeArgument, overrides: SetOption = [], out: OutOption = None, as_json: JsonOption = False
) -> None:
    """Train or load the teacher of a recipe.

    Example: edgekd teacher recipe.toml
    """
    run_recipe(recipe, overrides, out, None, "teacher", False, as_json)


@app.command()
def distill(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; or give --teacher, --student and --data.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A run, RUN:stage or artifact to learn from.")] = None,
    student: Annotated[str | None, typer.Option(help="A model: a name, or package.module:function.")] = None,
    data: Annotated[str | None, typer.Option(help="A data set: a name, or package.module:function.")] = None,
    overrides: SetOption = [],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a student with a teacher: a recipe up to its stage `distill`, or a teacher, a student and data.

    Example: edgekd distill --teacher runs/demo:teacher --student cifar-resnet --set model.depth=8 --set epochs=5
    """
    if recipe is not None:
        run_recipe(recipe, overrides, out, None, "distill", False, as_json)
        return
    if teacher is None or student is None:
        raise UsageError("give a recipe, or --teacher and --student", hint="edgekd distill --help shows an example")
    _show(_run("distill", teacher, None, None, data, [f'model.use="{student}"', *overrides], out), as_json)


@app.command()
def prune(
    source: SourceArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    overrides: SetOption = [],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take channels away and heal.

    Example: edgekd prune runs/demo:distill --set target.macs=0.6 --set heal.epochs=2
    """
    _show(_run("prune", source, model, weights, data, overrides, out), as_json)


@app.command()
def quantize(
    source: SourceArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    overrides: SetOption = [],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize to int8 as the profile's runtime fuses it, and heal.

    Example: edgekd quantize runs/demo:prune --set heal.epochs=0
    """
    _show(_run("quantize", source, model, weights, data, overrides, out), as_json)


@app.command()
def export(
    source: SourceArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    target: Annotated[list[str], typer.Option(help="onnx; trt (default where a profile runs TensorRT).")] = [],
    profile: Annotated[str | None, typer.Option(help="The device's profile, instead of the recipe's.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not ask TensorRT about the files.")] = False,
    build: Annotated[bool, typer.Option("--build", help="Build TensorRT engines, on the device itself.")] = False,
    backend: Annotated[
        Backend | None, typer.Option(help="What --build uses: the ONNX files (default), or the PyTorch network.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Where the bundle for the device goes (default: into the run).")
    ] = None,
    overrides: SetOption = [],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the file that a runtime loads, and compare it with the network on real images.

    For TensorRT: int8, fp16 and fp32 files, verified without a GPU (exit 3 where a layer that should be int8 is not),
    and a bundle that builds and measures them on the device.

    Example: edgekd export runs/demo:quantize --target trt --profile jetson-orin-nano-8gb
    """
    asked = [f"targets={json.dumps(target)}"] if target else []
    if profile is not None:
        asked.append(f"profiles={json.dumps([profile])}")
    if build and target and "trt" not in target:
        raise UsageError("engines are TensorRT's", where="--build", hint="--target trt")
    if backend is not None and not build:
        raise UsageError("says what engines are built with, and none are asked for", where="--backend", hint="--build")
    if profile is not None and (build or "trt" in target):
        from ..exporting import profile_with_tensorrt

        profile_with_tensorrt(profile)
    made = _run("export", source, model, weights, data, [*asked, *overrides], out)
    if bundle is not None and len(made) > 1:
        hint = f"name one as SOURCE: {', '.join(str(a.path) for a in made)}"
        raise UsageError(f"{len(made)} exports do not go into one bundle", where="--bundle", hint=hint)
    delivered = []
    for artifact in made:
        if artifact.manifest.metrics.get("tensorrt") or bundle is not None or build:
            from ..exporting import deliver

            made_with = (backend or Backend.tensorrt) if build else None
            delivered.append(
                deliver(artifact, profile=profile, data=data, verified=not no_verify, build=made_with, bundle=bundle)
            )
    _show(made, as_json, {str(d.artifact.path): d.document for d in delivered})
    raise typer.Exit(0 if all(d.ok for d in delivered) else 3)


def _run(
    stage: str,
    source: str | None,
    model: str | None,
    weights: Path | None,
    data: str | None,
    overrides: list[str],
    out: Path | None,
) -> list[Artifact]:
    from ..screen import watching
    from ..single import run_single

    with watching(False) as emit:
        return run_single(stage, source, model, weights, data, overrides, out, emit)


def _show(made: Sequence[Artifact], as_json: bool, more: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Paths, or one document with the manifests and `more` of each path."""
    if as_json:
        rows = [
            {"path": str(a.path), "manifest": a.manifest.model_dump(mode="json"), **(more or {}).get(str(a.path), {})}
            for a in made
        ]
        print_json(rows[0] if len(rows) == 1 else {"artifacts": rows})
    else:
        print_text("\n".join(str(a.path) for a in made))
