"""The pages on devices: their commands are the program's, and docs/jetson.md says what edgekd/jetpack.py knows."""

from __future__ import annotations

import re
import shlex
import tomllib
from itertools import groupby
from pathlib import Path

import pytest
import typer

from edgekd.catalogue import vetted
from edgekd.cli import COMMANDS, app
from edgekd.jetpack import JETPACKS, JetPack, highest_opset
from edgekd.profile import load_profile
from edgekd.recipe import parse_recipe

DOCS = Path(__file__).parents[1] / "docs"
JETSON = (DOCS / "jetson.md").read_text(encoding="utf-8")
PAGES = ("jetson.md", "tensorrt.md", "devices.md", "estimates.md", "profiles.md")


def commands(page: str) -> list[str]:
    """The lines of a page's blocks that call edgekd, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if language in ("", "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("edgekd ")]


def understood(line: str) -> None:
    """Let the command line be parsed, and nothing run. Raises what the parser raises."""
    assert COMMANDS
    root = command = typer.main.get_command(app)
    assert hasattr(command, "commands"), "a group, or nothing below would be looked at"
    _, *rest = shlex.split(line, comments=True)
    while (known := getattr(command, "commands", None)) is not None:
        assert rest[0] in known, f"no command {rest[0]}: {line}"
        command, rest = known[rest[0]], rest[1:]
    command.make_context(command.name, rest, parent=root.context_class(root, info_name="edgekd"))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_pages_is_understood(page: str) -> None:
    found = commands((DOCS / page).read_text(encoding="utf-8"))
    assert len(found) >= 2
    for line in found:
        understood(line)


def test_a_command_that_is_not_there_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --no-such"):
        understood("edgekd verify model.onnx --no-such")
    with pytest.raises(AssertionError, match="no command deploy"):
        understood("edgekd deploy model.onnx")


def row(packs: list[JetPack]) -> str:
    """One line for releases that have the same of all this."""
    first, last = packs[0], packs[-1]
    builders = [first.tensorrt, *first.also]
    files = dict.fromkeys("int8-fp16, opset 19" if int(v.split(".")[0]) >= 11 else "int8, opset 17" for v in builders)
    l4t = [version for pack in packs for version in pack.l4t]
    cells = [
        first.version if first is last else f"{first.version} – {last.version}",
        (l4t[0] if len(l4t) == 1 else f"{l4t[0]} – {l4t[-1]}") if l4t else "–",
        *(first.cuda, first.tensorrt, ", ".join(first.also) or "–", first.python),
        *(str(highest_opset(first.tensorrt)), "; ".join(files), ", ".join(first.dla) or "–"),
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_releases_is_the_programs() -> None:
    same = groupby(JETPACKS, key=lambda p: (p.cuda, p.tensorrt, p.also, p.python, p.dla))
    wanted = [
        "| JetPack | L4T | CUDA | TensorRT | or also | Python | highest opset | int8 file | DLA with |",
        "| --- " * 9 + "|",
        *(row(list(packs)) for _, packs in same),
    ]
    table = JETSON.partition("<!-- table:jetson -->\n")[2].partition("<!-- /table:jetson -->")[0]
    assert table.strip().splitlines() == wanted


def test_the_profiles_and_the_recipe_of_the_page_are_right(tmp_path: Path) -> None:
    profile, recipe, rules = (
        tomllib.loads(block) for block in re.findall(r"^```toml\n(.*?)^```", JETSON, re.DOTALL | re.MULTILINE)
    )
    file = tmp_path / "mine.toml"
    file.write_text(re.findall(r"^```toml\n(.*?)^```", JETSON, re.DOTALL | re.MULTILINE)[0])
    assert vetted(str(file)) == (str(file), [], [])
    mine = load_profile(str(file))
    assert mine.tensorrt is not None
    assert (mine.tensorrt.version, mine.tensorrt.jetpack) == ("8.6", "6.0")
    parsed = parse_recipe({**recipe, "gate": rules["gate"]})
    assert [load_profile(name).scheme for name in parsed.profiles] == ["trt-s8s8"]
    assert profile["extends"] in parsed.profiles
