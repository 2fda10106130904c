"""`edgekd init`, and what it writes at work, as a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import spawn

from edgekd.artifact import Artifact
from edgekd.profile import load_profile
from edgekd.recipe import load_recipe

Call = Callable[..., Any]


def test_init_then_run(tmp_path: Path, edgekd: Call) -> None:
    done = edgekd("init", "my project", cwd=tmp_path)
    assert done.code == 0
    assert done.out.splitlines() == [f"my project/{name}" for name in ("recipe.toml", "own.py", "profile.toml")]
    assert done.err == "next: cd 'my project' && edgekd run recipe.toml\n"
    there = tmp_path / "my project"
    assert load_recipe(there / "recipe.toml").teacher[0]["model"] == {"use": "own:network"}
    assert load_profile(str(there / "profile.toml")).protocol.rounds == 12
    quick = ["--set", "teacher.epochs=1", "--set", "stage.distill.epochs=1", "--set", "data.batch=256"]
    ran = spawn("run", "recipe.toml", "--until", "distill", *quick, cwd=there)
    assert ran.code == 0, ran.err
    artifact = Artifact.open(there / ran.out.strip())
    assert artifact.manifest.kind == "distill"
    assert artifact.manifest.classes == [str(i) for i in range(10)]


def test_init_overwrites_only_when_told_to(tmp_path: Path, edgekd: Call) -> None:
    (tmp_path / "own.py").write_text("# mine\n")
    refused = edgekd("init", cwd=tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert "own.py already there" in refused.err
    assert "--force" in refused.err
    assert [p.name for p in tmp_path.iterdir()] == ["own.py"]
    forced = edgekd("init", "--force", cwd=tmp_path)
    assert forced.code == 0
    assert forced.err == "next: edgekd run recipe.toml\n"
    assert "def network" in (tmp_path / "own.py").read_text()


def test_init_where_nothing_can_be_written(tmp_path: Path, edgekd: Call) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        done = edgekd("init", place, cwd=tmp_path)
        assert (done.code, done.out) == (3, "")
        assert "Traceback" not in done.err
        assert place in done.err
