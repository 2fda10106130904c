"""`edgekd list`, `show`, `doctor`, `schema`, help and start-up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekd import __version__
from edgekd.registry import KINDS, names
from edgekd.shipped import shipped

Call = Callable[..., Any]
COMMANDS = [
    *("init", "demo", "run", "check", "teacher", "distill", "prune", "quantize", "export"),
    *("search", "students", "sensitivity", "bench", "gate", "report", "list", "show", "doctor", "schema"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(edgekd: Call, command: str) -> None:
    done = edgekd(command, "--help")
    assert done.code == 0
    example = re.search(rf"Example: edgekd {command}( .+)?$", done.out.replace("│", ""), re.MULTILINE)
    assert example, done.out


def test_help_lists_the_commands_of_the_design(edgekd: Call) -> None:
    shown = edgekd("--help").out
    assert set(COMMANDS) <= set(re.findall(r"^│ (\w+) ", shown, re.MULTILINE))
    assert edgekd("-h").out == shown
    assert edgekd("--version").out == f"edgekd {__version__}\n"


def test_no_command_and_unknown_ones_are_usage_errors(edgekd: Call) -> None:
    unknown = edgekd("distil")
    assert unknown.code == 2
    assert "distil" in unknown.err
    assert edgekd().code == 2
    option = edgekd("run", "recipe.toml", "--epochs", "3")
    assert option.code == 2
    assert "--epochs" in option.err
    assert edgekd("run").code == 2


HEAVY = ["torch", "numpy", "onnx", "onnxruntime", "sklearn", "accelerate", "rich.progress"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_waits_for_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['edgekd', *{arguments!r}]\n"
        "from edgekd.cli import main\n"
        "try: main()\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_judging_and_reporting_do_without_torch(finished: Any) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['edgekd', 'gate', {str(finished.directory)!r}]\n"
        "from edgekd.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=finished.directory.parents[1]
    )
    assert done.stderr.splitlines()[-1] == "False"
    assert done.stdout.startswith("pass")


def test_completion_can_be_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgekd", "--show-completion", "bash"], capture_output=True, text=True, check=False
    )
    if "not supported" in done.stderr:
        pytest.skip("no shell started these tests, and Typer asks which one it was")
    assert done.returncode == 0
    assert "complete" in done.stdout


def test_a_reader_that_has_enough_is_no_failed_gate() -> None:
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -m edgekd list profiles | true; echo ${PIPESTATUS[0]}', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() in ("141", "0")  # 0 where all was written before the reader left
    assert done.stderr == ""


@pytest.mark.parametrize("kind", [*KINDS, "profiles", "recipes", "importances"])
def test_every_kind_can_be_listed_and_each_entry_has_a_line(edgekd: Call, kind: str) -> None:
    document = json.loads(edgekd("list", kind, "--json").out)
    assert (document["version"], document["kind"]) == (1, kind)
    if kind in KINDS:
        assert [i["name"] for i in document["items"]] == names(kind)
    assert all(i["summary"] for i in document["items"]), document
    text = edgekd("list", kind).out
    assert [line.split()[0] for line in text.splitlines()] == [i["name"] for i in document["items"]]
    if kind in ("objectives", "teachers", "rules", "stages"):
        assert max(len(line) for line in text.splitlines()) <= 120


def test_an_unknown_kind(edgekd: Call) -> None:
    done = edgekd("list", "objectivs")
    assert (done.code, done.out) == (2, "")
    assert "did you mean 'objectives'?" in done.err


def test_show_components(edgekd: Call) -> None:
    kl = edgekd("show", "kl")
    assert kl.code == 0
    assert "kl (objectives)" in kl.out
    assert "source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531" in kl.out
    assert "lives in: edgekd.objectives.logit:SoftTargets" in kl.out
    assert "  tau (float or { use = ... }, default 4.0): temperature: above 0, or a rule" in kl.out
    assert "  weight (float or { use = ... }, default 1.0): factor in the loss" in kl.out
    hint = json.loads(edgekd("show", "hint", "--json").out)
    assert (hint["version"], hint["kind"], hint["name"]) == (1, "objectives", "hint")
    assert hint["parameters"][0] == "student (str, required): module path, such as layer2"
    assert tomllib.loads(hint["snippet"])["objectives"][2]["student"] == "layer2"
    ensemble = edgekd("show", "ensemble").out
    assert '  combine ("mean", "fixed", "accuracy", "confidence", "random" or "source", default "mean")' in ensemble
    assert "  weights (list of float ≥ 0, optional): of 'fixed': one per teacher" in ensemble
    stage = edgekd("show", "distill").out
    assert "  lr (float > 0, default 0.1): peak learning rate" in stage
    assert 'in a recipe: { use = "prune", target = ... }' in edgekd("show", "prune").out


@pytest.mark.parametrize("kind", list(KINDS))
def test_everything_that_is_listed_can_be_shown(edgekd: Call, kind: str) -> None:
    for name in names(kind):
        done = edgekd("show", name)
        assert done.code == 0, done.err
        assert name in done.out


def test_show_profiles_artifacts_and_files(finished: Any, edgekd: Call) -> None:
    profile = json.loads(edgekd("show", "cpu-x86", "--json").out)
    assert profile["profile"]["scheme"] == "x86-u8s8"
    assert "channel_multiple = 16" in edgekd("show", "cpu-x86").out
    assert "threads" in edgekd("show", "profile.toml").out
    pruned = next(finished.directory.glob("02-prune-*"))
    text = edgekd("show", str(pruned)).out
    assert f"prune  {pruned}" in text
    assert re.search(r"^layer2\.0\.conv1 +\d+ -> \d+ +\d+ %", text, re.MULTILINE)
    document = json.loads(edgekd("show", str(pruned), "--json").out)
    assert document["manifest"]["kind"] == "prune"
    file = next(finished.directory.glob("04-export-*/model.onnx"))
    text = edgekd("show", str(file)).out
    assert "image float32 ['batch', 3, 16, 16]" in text
    assert re.search(r"layers +[1-9]\d* int8 and 0 float", text)
    document = json.loads(edgekd("show", str(file), "--json").out)
    assert document["metadata"]["classes"] == [str(i) for i in range(10)]
    assert document["metadata"]["preprocessing"]["size"] == [3, 16, 16]


def test_show_a_recipe_says_what_it_is(edgekd: Call, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('version = 1\nname = "mine"\ndata = { use = "digits" }\n')
    done = edgekd("show", str(file))
    assert done.code == 2
    assert f"{file} is a recipe, not a profile" in done.err.replace("\n", "")
    assert f"edgekd check {file}" in done.err.replace("\n", "")
    file.write_text('extends = "cpu-x86"\n')
    assert edgekd("show", str(file)).code == 0


def test_show_what_is_not_there(edgekd: Call) -> None:
    done = edgekd("show", "hnt")
    assert (done.code, done.out) == (2, "")
    assert "nothing is called 'hnt'" in done.err
    assert "did you mean 'hint'?" in done.err


def test_doctor(edgekd: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd import inspect
    from edgekd.runtimes.doctor import RuntimeStatus

    statuses = [
        RuntimeStatus(name="onnxruntime", available=True, version="1.2.3"),
        RuntimeStatus(name="tensorrt", available=False, why="not installed", install="pip install 'edgekd[trt]'"),
    ]
    monkeypatch.setattr(inspect, "probe", lambda: statuses)
    shown = edgekd("doctor").out
    assert re.search(r"^ok +onnxruntime +1\.2\.3$", shown, re.MULTILINE)
    assert re.search(r"^missing +tensorrt +not installed; pip install 'edgekd\[trt\]'$", shown, re.MULTILINE)
    document = json.loads(edgekd("doctor", "--json").out)
    assert document["version"] == 1
    assert [r["available"] for r in document["runtimes"]] == [True, False]
    assert {"machine", "runtimes", "warnings"} <= set(document)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    from edgekd.inspect import recipe_schema

    return json.loads(json.dumps(recipe_schema()))


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def errors(node: Any, value: Any, root: dict[str, Any], path: str = "") -> list[str]:
    """What a JSON schema says against a value: the keywords that pydantic writes, and no others."""
    known = {
        *("$defs", "$ref", "additionalProperties", "anyOf", "allOf", "oneOf", "const", "default", "description"),
        *("enum", "exclusiveMaximum", "exclusiveMinimum", "format", "items", "maxItems", "maximum", "minItems"),
        *("minLength", "minimum", "pattern", "prefixItems", "properties", "required", "title", "type", "x-components"),
    }
    if isinstance(node, bool):
        return [] if node else [f"{path}: not allowed"]
    assert set(node) <= known, set(node) - known
    if "$ref" in node:
        return errors(root["$defs"][node["$ref"].removeprefix("#/$defs/")], value, root, path)
    for keyword in ("anyOf", "oneOf"):
        if keyword in node:
            branches = [errors(branch, value, root, path) for branch in node[keyword]]
            return [] if any(not b for b in branches) else min(branches, key=len)
    found: list[str] = []
    if "const" in node and value != node["const"]:
        found.append(f"{path}: not {node['const']!r}")
    if "enum" in node and value not in node["enum"]:
        found.append(f"{path}: not one of {node['enum']}")
    kinds = node.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds[:1]:
        right = isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
        if not right:
            return [f"{path}: not {kind}"]
    if isinstance(value, int | float):
        checks = {
            "minimum": lambda v, limit: v >= limit,
            "maximum": lambda v, limit: v <= limit,
            "exclusiveMinimum": lambda v, limit: v > limit,
            "exclusiveMaximum": lambda v, limit: v < limit,
        }
        found += [f"{path}: {k}" for k, holds in checks.items() if k in node and not holds(value, node[k])]
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += errors(node.get("items", True), item, root, f"{path}[{i}]")
    if isinstance(value, dict):
        found += [f"{path}.{key}: missing" for key in node.get("required", []) if key not in value]
        for key, item in value.items():
            inner = node.get("properties", {}).get(key, node.get("additionalProperties", True))
            found += errors(inner, item, root, f"{path}.{key}")
    return found


@pytest.mark.parametrize("file", sorted(shipped("recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_the_schema_accepts_the_shipped_recipes(schema: dict[str, Any], file: Path) -> None:
    assert errors(schema, tomllib.loads(file.read_text()), schema) == []


def test_the_schema_accepts_bare_names(schema: dict[str, Any]) -> None:
    table = tomllib.loads((shipped("recipes") / "demo.toml").read_text())
    table["teacher"]["model"] = table["stage"][0]["model"] = "vit"
    table |= {"task": "classification", "stage": [table["stage"][0], "quantize", "export"]}
    table["data"]["augment"] = ["flip", {"use": "mixup"}]
    assert errors(schema, table, schema) == []
    table["teacher"] = [table["teacher"], {**table["teacher"], "classes": ["0", "1"]}]
    assert errors(schema, table, schema) == []
    table["teacher"][1]["clases"] = []
    assert errors(schema, table, schema) != []


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda t: t.pop("teacher"), ".teacher: missing"),
        (lambda t: t.update(sed=1), ".sed: not allowed"),
        (lambda t: t.update(seed="a"), ".seed: not integer"),
        (lambda t: t["teacher"].update(epoch=1), ".teacher.epoch: not allowed"),
        (lambda t: t["teacher"].update(epochs=-1), ".teacher.epochs: minimum"),
        (lambda t: t["stage"][0].update(use="distil"), "stage[0]"),
        (lambda t: t["stage"][0].update(lr=0), ".stage[0].lr: exclusiveMinimum"),
        (lambda t: t["stage"][1].pop("target"), ".stage[1].target: missing"),
        (lambda t: t["stage"][2].update(calibration="all"), ".stage[2].calibration: not integer"),
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(
    schema: dict[str, Any], change: Callable[[dict[str, Any]], Any], place: str
) -> None:
    table = tomllib.loads((shipped("recipes") / "demo.toml").read_text())
    change(table)
    assert any(place in e for e in errors(schema, table, schema))


def test_the_schema_is_whole_and_printed(schema: dict[str, Any], edgekd: Call) -> None:
    printed = edgekd("schema")
    assert json.loads(printed.out) == schema

    def references(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for inner in node.values():
                yield from references(inner)
        elif isinstance(node, list):
            for inner in node:
                yield from references(inner)

    assert {r.removeprefix("#/$defs/") for r in references(schema)} <= set(schema["$defs"])
    *stages, bare = schema["properties"]["stage"]["items"]["anyOf"]
    assert [s["properties"]["use"]["const"] for s in stages] == [
        *("average", "distill", "export", "fuse", "prune", "quantize")
    ]
    assert bare == {"enum": ["average", "distill", "export", "fuse", "quantize"]}  # prune needs its target
