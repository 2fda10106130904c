"""What edgekd knows: components, profiles, recipes, artifacts, ONNX files, and this machine."""

from __future__ import annotations

import contextlib
import json
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from .artifact import MANIFEST, Artifact
from .bench import disturbances, environment
from .errors import UsageError, nearest
from .explain import Explanation, explain_file, explanation_text, plan_text, precision_text
from .profile import Profile, load_profile, profile_names, profile_toml
from .recipe import Recipe, load_recipe
from .registry import KINDS, names, parameters, resolve, summary
from .runtimes import open_session, probe
from .runtimes.metadata import parse_metadata
from .shipped import shipped

__all__ = ["describe", "diagnosis", "listing", "recipe_schema"]

#: Arguments that edgekd itself passes, which a recipe does not write.
FILLED_IN = ("network", "num_classes", "in_channels", "image_size")


def listing(kind: str) -> list[tuple[str, str]]:
    """Names of a kind with one line each. Raises UsageError for an unknown kind."""
    if kind == "profiles":
        return [(name, load_profile(name).description) for name in profile_names()]
    if kind == "recipes":
        return [(path.stem, _first_comment(path)) for path in sorted(shipped("recipes").glob("*.toml"))]
    if kind == "importances":
        from .pruning import IMPORTANCES

        return sorted(IMPORTANCES.items())
    if kind not in KINDS:
        known = [*KINDS, "profiles", "recipes", "importances"]
        raise UsageError(f"no kind {kind!r}", where="list", hint=nearest(kind, known))
    return [(name, summary(resolve(kind, name)[0])) for name in names(kind)]


def _first_comment(path: Path) -> str:
    comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return comments[0] if comments else ""


def describe(
    name: str, *, profile: str | None = None, recipe: str | None = None, against: Path | None = None
) -> dict[str, Any]:
    """A document with the key `text` for the screen.

    Of files and artifacts, `profile` says with how many threads layers are timed, `recipe` names the data and
    profiles where none lies beside, and `against` is the float file that an ONNX file is compared with. Raises
    UsageError when nothing is called `name`, and what reading and running a file raise.
    """
    path = Path(name)
    if (path / MANIFEST).is_file():
        if against is not None:
            raise UsageError("artifacts know their float network", where="--against", hint="leave it out")
        return _artifact(Artifact.open(path), profile, recipe)
    if path.suffix == ".onnx":
        return _onnx(path, profile, recipe, against)
    for option, value in (("--profile", profile), ("--recipe", recipe), ("--against", against)):
        if value is not None:
            raise UsageError(f"{name} is no file or artifact", where=option, hint="it is for what has layers")
    if name in profile_names() or (path.suffix == ".toml" and path.is_file()):
        if path.is_file() and _holds_stages(path):
            raise UsageError(f"{name} is a recipe, not a profile", where="show", hint=f"edgekd check {name}")
        found = load_profile(name, "show")
        return {"profile": found.model_dump(mode="json"), "text": profile_toml(found)}
    known: list[str] = profile_names()
    for kind in KINDS:
        known += names(kind)
        if name in names(kind):
            return _component(kind, name)
    raise UsageError(f"nothing is called {name!r}", where="show", hint=nearest(name, known))


def _holds_stages(path: Path) -> bool:
    """Whether a TOML file is a recipe; what cannot be read is told by whoever reads it."""
    with contextlib.suppress(OSError, ValueError):
        return bool({"teacher", "stage", "data"} & tomllib.loads(path.read_text(encoding="utf-8")).keys())
    return False


def _component(kind: str, name: str) -> dict[str, Any]:
    # Here and not above: they import torch, and what is told of files does without.
    from .objectives import ObjectiveSpec
    from .signature import DISTILLED, documented, parameter_rows, snippet
    from .teachers import FILLED_IN as LEARNING

    component, _ = resolve(kind, name)
    fields = parameters(component, skip=LEARNING if kind == "teachers" else FILLED_IN).model_fields
    rows = parameter_rows(fields)
    about, source, module = documented(component)
    lines = snippet(kind, name, component, fields)
    text = [f"{name} ({kind})", "", about, ""]
    text += [f"source: {source}"] if source else []
    text += [f"lives in: {module}", ""]
    text += ["parameters:", *(f"  {row}" for row in rows)] if rows else ["no parameters"]
    if kind == "objectives":
        of_any = {key: field for key, field in get_args(ObjectiveSpec)[0].model_fields.items() if key != "use"}
        text += ["as every objective:", *(f"  {row}" for row in parameter_rows(of_any))]
    if kind in DISTILLED:
        text += ["", 'in a recipe, below [[stage]] and use = "distill":', *(f"  {line}" for line in lines.splitlines())]
    else:
        text += ["", f"in a recipe: {lines}"]
    described = {"kind": kind, "name": name, "source": source, "module": module, "parameters": rows, "snippet": lines}
    return {**described, "text": "\n".join(text)}


def _artifact(artifact: Artifact, profile: str | None, recipe: str | None) -> dict[str, Any]:
    manifest = artifact.manifest
    lines = [f"{manifest.kind}  {artifact.path}", f"key      {manifest.key}"]
    lines += [f"parent   {role}: {key}" for role, key in manifest.parents.items()]
    lines += [f"model    {manifest.model.use} {json.dumps(manifest.model.args)}"]
    lines += [f"metric   {key} = {value}" for key, value in manifest.metrics.items()]
    lines += [f"file     {name}  {size:,} bytes" for name, (_, size) in manifest.files.items()]
    document: dict[str, Any] = {"manifest": manifest.model_dump(mode="json")}
    if "plan.json" in manifest.files:
        document["plan"] = json.loads(artifact.file("plan.json").read_text())
        lines += ["", plan_text(document["plan"])]
    if "precision.json" in manifest.files:
        document["precision"] = json.loads(artifact.file("precision.json").read_text())
        lines += ["", precision_text(document["precision"])]
    if manifest.quantization is not None or manifest.kind == "quantize":
        explanation = _quantized(artifact, profile, recipe)
        document["explanation"] = explanation.model_dump(mode="json")
        lines += ["", explanation_text(explanation)]
    return {**document, "text": "\n".join(lines)}


def _quantized(artifact: Artifact, profile: str | None, recipe: str | None) -> Explanation:
    from .explain.artifact import explain_artifact  # here: it imports torch

    file = recipe or artifact.path.parent / "recipe.toml"
    found = load_recipe(file) if recipe or Path(file).is_file() else None
    return explain_artifact(artifact, _profile(profile, found), found)


def _profile(name: str | None, recipe: Recipe | None) -> Profile:
    """The one that is asked for, otherwise the recipe's first."""
    return load_profile(
        name or (recipe.profiles[0] if recipe is not None and recipe.profiles else "cpu-x86"), "--profile"
    )


def _onnx(path: Path, profile: str | None, recipe: str | None, against: Path | None) -> dict[str, Any]:
    owner = Artifact.open(path.parent) if (path.parent / MANIFEST).is_file() else None
    if against is None and owner is not None and owner.manifest.quantization is not None:
        explanation = _quantized(owner, profile, recipe)
    else:
        found = load_recipe(recipe) if recipe is not None else None
        explanation = explain_file(path, _profile(profile, found), against)
    session = open_session(path)
    tensors = {"inputs": session.inputs, "outputs": session.outputs}
    metadata = parse_metadata(session.metadata)
    session.close()
    lines = [str(path), f"size     {path.stat().st_size / 1e6:.3f} MB", f"made by  {explanation.producer}"]
    for role, infos in tensors.items():
        lines += [f"{role[:-1]:<8} {i.name} {i.dtype} {i.axes}" for i in infos]
    lines += [f"metadata {key}: {value}" for key, value in metadata.items()]
    lines += ["", explanation_text(explanation)]
    document: dict[str, Any] = {k: [i.model_dump(mode="json") for i in v] for k, v in tensors.items()}
    counts = {"int8": explanation.summary.int8_layers, "float": explanation.summary.float_layers}
    document |= {"layers": counts, "metadata": metadata, "explanation": explanation.model_dump(mode="json")}
    return {**document, "text": "\n".join(lines)}


def diagnosis() -> dict[str, Any]:
    """This machine, its runtimes, and what would disturb a measurement."""
    machine = environment()
    runtimes = []
    for status in probe():
        text = status.version or "" if status.available else f"{status.why}; {status.install}"
        runtimes.append({"name": status.name, "available": status.available, "text": text})
    return {"machine": machine, "runtimes": runtimes, "warnings": disturbances(machine)}


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe: stages, objectives and the other components with all their parameters."""
    schema = Recipe.model_json_schema()
    places = {"stage": "stages", "data": "data", "task": "tasks"}
    for key, kind in places.items():
        alternatives = [_component_schema(kind, name) for name in names(kind) if name != "teacher"]
        target = schema["properties"][key]
        target.setdefault("x-components", alternatives)
    teacher = _component_schema("stages", "teacher")
    schema["properties"]["teacher"] = {"anyOf": [teacher, {"type": "array", "items": teacher, "minItems": 1}]}
    stages = schema["properties"]["stage"]
    bare = {"enum": [s["properties"]["use"]["const"] for s in stages["x-components"] if s["required"] == ["use"]]}
    schema["properties"]["stage"] = {"type": "array", "items": {"anyOf": [*stages["x-components"], bare]}}
    _lift_definitions(schema)
    return schema


def _component_schema(kind: str, name: str) -> dict[str, Any]:
    model: type[BaseModel] = parameters(resolve(kind, name)[0], skip=FILLED_IN)
    own = model.model_json_schema()
    own["properties"] = {"use": {"const": name}, **own.get("properties", {})}
    if kind == "stages" and name != "teacher":
        own["required"] = ["use", *own.get("required", [])]
    return own


def _lift_definitions(schema: dict[str, Any]) -> None:
    """Move nested `$defs` to the root, where `$ref`s look for them."""
    root = schema.setdefault("$defs", {})

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node is not schema:
                root.update(node.pop("$defs", {}))
            for value in list(node.values()):
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(schema)
    for definition in list(root.values()):
        walk(definition)
