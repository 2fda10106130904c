"""What holds for every file of the project: conventions that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import edgekd
from edgekd.profile import load_profile, profile_names
from edgekd.recipe import load_recipe
from edgekd.shipped import shipped

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "edgekd").rglob("*.py"))
#: Written apart so that this file does not match itself.
MACHINE = re.compile(r"(?<![\w.$}/-])/(?:" + "|".join(["work", "root", "opt", "tmp"]) + r")/")
HOSTS = re.compile(r"pypi\." + r"org|python" + r"hosted|download\.pytorch|npm" + r"js\.|deb\.debian" + r"\.")
public = pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))


def tracked() -> list[Path]:
    """The files that git knows, or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


@public
def test_module(file: Path) -> None:
    """At most 400 lines, `__all__` where others import from it, docstrings on what is in it (ruff sorts it)."""
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for in its first line"
    names = assigned(tree, "__all__")
    if names is None:
        assert "if __name__" in text or file.parent.name == "cli", "`__all__` says what others may import"
        return
    assert len(names) == len(set(names))
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names]
    # One line of code says as much as a docstring about it would.
    assert [n.name for n in public if not ast.get_docstring(n) and len(n.body) > 2] == []


def assigned(tree: ast.Module, name: str) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return list(ast.literal_eval(node.value))
    return None


def test_names_in_all_exist() -> None:
    for file in MODULES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        bound = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        missing = set(assigned(tree, "__all__") or []) - bound
        assert not missing, f"{file.relative_to(ROOT)}: {missing}"


def test_no_machine_and_no_registry_is_named() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE.search(line) or HOSTS.search(line)
    ]
    assert found == []


def test_no_pickle() -> None:
    calls = re.compile(r"pickle\.loads?\(|weights_only=False|allow_pickle=True")
    assert [str(p.relative_to(ROOT)) for p in MODULES if calls.search(p.read_text(encoding="utf-8"))] == []


def test_version_is_said_once_and_the_changelog_knows_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    assert version("edgekd") == edgekd.__version__
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_constraints_pin_every_requirement() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert list(pins) == sorted(pins)
    assert not [pin for pin in pins.values() if "+" in pin], "a local version is on no registry"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["timm"], *extras["hf"], *extras["search"]]
    names = [re.match(r"[A-Za-z0-9-]+", requirement)[0] for requirement in wanted]
    assert [name for name in names if name not in pins] == []


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, edgekd.cli; sys.argv = ['edgekd', '--help']\n"
        "try: edgekd.cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'sklearn', 'accelerate'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distil" in done.stdout.lower()


def test_a_recipe_is_read_without_torch() -> None:
    code = (
        "import sys; from edgekd.recipe import load_recipe; from edgekd.profile import load_profile\n"
        "load_recipe('demo'); load_profile('cpu-x86'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shipped_files_are_those_of_the_checkout() -> None:
    assert shipped("recipes") == ROOT / "recipes"
    assert shipped("profiles") == ROOT / "profiles"
    assert [load_recipe(f.stem).name for f in shipped("recipes").glob("*.toml")]
    assert [load_profile(name).name for name in profile_names()] == profile_names()


def test_ci_calls_what_the_readme_says() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[0].endswith("bash")
    assert lines[-1] == "make test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme
