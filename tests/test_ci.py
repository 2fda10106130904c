"""The CI files: valid by their published schemas, and their steps run as the scripts that they are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from edgekd.workflows import ACTION, CI_FILES

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

#: Stands for GitHub's program: keeps comments in a file, as the API would.
GH = """\
#!{python}
import json, os, sys
store = os.environ["GH_STORE"]
state = json.load(open(store)) if os.path.exists(store) else {{"calls": [], "comments": {{}}}}
arguments = sys.argv[1:]
method = arguments[arguments.index("--method") + 1] if "--method" in arguments else "GET"
path = next(a for a in arguments if a.startswith("repos/"))
state["calls"].append([method, path])
if method == "GET":
    print("\\n".join(k for k, body in state["comments"].items() if body.startswith("<!-- edgekd -->")))
else:
    body = open(arguments[arguments.index("--field") + 1].removeprefix("body=@")).read()
    state["comments"]["77" if method == "POST" else path.rpartition("/")[2]] = body
json.dump(state, open(store, "w"))
"""


@pytest.mark.parametrize("ci", [*CI_FILES, "action"])
def test_files_are_valid_by_their_published_schema(ci: str, tmp_path: Path) -> None:
    schema = {"github": "vendor.github-workflows", "gitlab": "vendor.gitlab-ci", "action": "vendor.github-actions"}[ci]
    file = tmp_path / "file.yml"
    file.write_text(ACTION if ci == "action" else CI_FILES[ci][1])
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", schema]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    file.write_text(file.read_text().replace("run:", "rnu:").replace("script:", "scirpt:"))
    assert subprocess.run([*command, str(file)], capture_output=True).returncode == 1  # the schema does look


def test_the_action_of_this_repository_is_the_one_that_is_tested() -> None:
    assert (ROOT / "action.yml").read_text() == ACTION


def test_untrusted_text_reaches_scripts_by_the_environment_only() -> None:
    for text in (ACTION, CI_FILES["github"][1]):
        for step in _steps(yaml.safe_load(text)):
            assert "${{" not in step.get("run", "")


def _steps(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["runs"]["steps"] if "runs" in document else document["jobs"]["gate"]["steps"]


@pytest.fixture
def repository(project: Path, tmp_path: Path) -> Path:
    """A git repository with a base commit that has a recipe, and a head commit on top."""
    place = tmp_path / "repository"
    place.mkdir()
    recipe = (project / "recipe.toml").read_text()
    (place / "recipe.toml").write_text(recipe + 'latency = { p50 = { regress = "300%" } }\n'.replace("300%", "99%"))
    shutil.copy(project / "profile.toml", place)
    git(place, "init", "-q", "-b", "main")
    commit(place, "base")
    (place / "README.md").write_text("a change that changes no model\n")
    commit(place, "head")
    return place


def git(place: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=place, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(place: Path, message: str) -> None:
    (place / ".gitignore").write_text("runs/\n.edgekd-base/\n")
    git(place, "add", "-A")
    git(place, "commit", "-qm", message)


def environment(place: Path, **more: str) -> dict[str, str]:
    programs = place.parent / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "gh").write_text(GH.format(python=sys.executable))
    (programs / "gh").chmod(0o755)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(BIN), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",  # edgekd is installed: nothing is to be fetched
        "GITHUB_REPOSITORY": "me/mine",
        "GITHUB_STEP_SUMMARY": str(place.parent / "summary.md"),
        "GITHUB_OUTPUT": str(place.parent / "output.txt"),
        "GH_STORE": str(place.parent / "gh.json"),
        **more,
    }


def run_job(place: Path, document: dict[str, Any], values: dict[str, str], **more: str) -> tuple[int, str]:
    """The job's steps in order, as GitHub runs them: the first failure skips the rest but for `always()`."""
    base = environment(place, **{k: str(v) for k, v in document.get("env", {}).items()}, **more)
    code, log = 0, ""
    for step in _steps(document):
        if "run" not in step or (code and "always()" not in step.get("if", "")):
            continue
        if "inputs.base " in step.get("if", "") and not values.get("inputs.base"):
            continue
        output = Path(base["GITHUB_OUTPUT"])
        outputs = dict(line.split("=", 1) for line in output.read_text().splitlines()) if output.exists() else {}
        known = {**values, **{f"steps.gate.outputs.{k}": v for k, v in outputs.items()}}
        own = {key: _filled(text, known) for key, text in step.get("env", {}).items()}
        command, whole = ["bash", "-e", "-c", step["run"]], {**base, **own}
        done = subprocess.run(command, cwd=place, env=whole, capture_output=True, text=True, timeout=300)
        log += f"== {step['name']} ({done.returncode})\n{done.stdout}{done.stderr}"
        code = code or done.returncode
    return code, log


def _filled(text: str, known: dict[str, str]) -> str:
    """GitHub's expressions replaced by what they stand for; unknown ones are empty, as there."""
    return re.sub(r"\$\{\{ (.*?) \}\}", lambda m: known.get(m[1], ""), text)


def test_the_workflow_gates_a_pull_request_and_keeps_one_comment(repository: Path) -> None:
    document = yaml.safe_load(CI_FILES["github"][1])
    values = {
        "github.event.pull_request.base.sha": git(repository, "rev-parse", "HEAD~1"),
        "github.event.pull_request.number": "5",
        "github.token": "secret",
    }
    code, log = run_job(repository, document, values)
    assert code == 0, log
    verdicts = {v["rule"]: v for v in json.loads((repository / "runs/head/gate.json").read_text())["verdicts"]}
    assert "same rounds" in verdicts["latency.p50 regress"]["shown"]
    assert ElementTree.parse(repository / "runs/junit.xml").getroot().get("tests") == "2"
    assert "gate passes" in (repository.parent / "summary.md").read_text()
    state = json.loads((repository.parent / "gh.json").read_text())
    assert [method for method, _ in state["calls"]] == ["GET", "POST"]
    assert "| ✅ pass |" in state["comments"]["77"]

    (repository / "gate.toml").write_text("size_mb = { max = 0.000001 }\n")
    commit(repository, "an impossible rule")
    code, log = run_job(repository, document, values)
    assert code == 1, log
    state = json.loads((repository.parent / "gh.json").read_text())
    assert [method for method, _ in state["calls"]] == ["GET", "POST", "GET", "PATCH"]
    assert list(state["comments"]) == ["77"]
    assert "gate fails" in state["comments"]["77"]


def test_a_base_without_a_recipe_and_a_fork_without_a_token(repository: Path) -> None:
    git(repository, "checkout", "-q", "--orphan", "empty")
    git(repository, "rm", "-rq", "--cached", ".")
    git(repository, "commit", "-q", "--allow-empty", "-m", "nothing yet")
    empty = git(repository, "rev-parse", "HEAD")
    git(repository, "checkout", "-qf", "main")
    values = {"github.event.pull_request.base.sha": empty, "github.event.pull_request.number": "5"}
    code, log = run_job(repository, yaml.safe_load(CI_FILES["github"][1]), values)
    assert code == 0, log
    assert "nothing to compare with yet" in log
    assert "no baseline" in log
    assert "no comment" in log
    assert not (repository.parent / "gh.json").exists()


def test_the_action_takes_a_committed_baseline(repository: Path) -> None:
    document = yaml.safe_load(ACTION)
    inputs = {f"inputs.{k}": str(v.get("default", "")) for k, v in document["inputs"].items()}
    first = {**inputs, "inputs.base": "", "inputs.comment": "false"}
    code, log = run_job(repository, document, first)
    assert code == 0, log
    command = [str(BIN / "edgekd"), "baseline", "update", "runs/head", "-o", "baseline.json"]
    subprocess.run(command, cwd=repository, check=True, capture_output=True, env=environment(repository))
    code, log = run_job(repository, document, {**first, "inputs.baseline": "baseline.json"})
    assert code == 0, log
    assert "relative to teacher" in (repository / "runs/comment.md").read_text()


def test_gitlabs_script_runs_as_one_shell(repository: Path) -> None:
    job = yaml.safe_load(CI_FILES["gitlab"][1])["edgekd"]
    script = "\n".join(job["script"])
    more = {k: str(v) for k, v in job["variables"].items()}
    more |= {"CI_MERGE_REQUEST_DIFF_BASE_SHA": git(repository, "rev-parse", "HEAD~1")}
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=repository, env=environment(repository, **more), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no EDGEKD_TOKEN" in done.stdout
    assert "latency.p50 regress" in (repository / "runs/comment.md").read_text()
