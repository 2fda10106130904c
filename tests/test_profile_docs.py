"""docs/profiles.md: its table is the program's, its profile is right, and it names every shipped one."""

from __future__ import annotations

import re
from pathlib import Path

from edgekd.catalogue import vetted
from edgekd.jetpack import JETPACKS, highest_opset
from edgekd.profile import load_profile, profile_names

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")


def jetpack_table() -> str:
    lines = ["| JetPack | L4T | CUDA | cuDNN | TensorRT | also | Python | opset | DLA |", "| --- " * 9 + "|"]
    for p in JETPACKS:
        cells = (
            *(p.version, ", ".join(p.l4t) or "–", p.cuda, p.cudnn or "–", p.tensorrt, ", ".join(p.also)),
            *(p.python, highest_opset(p.tensorrt), ", ".join(p.dla)),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return re.sub(r" +\|", " |", "\n".join(lines))


def test_the_table_of_jetpacks_is_the_programs() -> None:
    table = PAGE.partition("<!-- table:jetpack -->\n")[2].partition("<!-- /table:jetpack -->")[0]
    assert table.strip() == jetpack_table()


def test_every_shipped_profile_has_a_row_with_its_scheme() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| `([\w-]+)` \|", PAGE, re.MULTILINE)
    assert sorted(name for name, _ in rows) == profile_names()
    assert {name: load_profile(name).scheme for name in profile_names()} == dict(rows)


def test_the_profile_of_the_page_is_right(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    file = tmp_path / "camera.toml"
    file.write_text(block)
    assert vetted(str(file)) == (str(file), [], [])
    profile = load_profile(str(file))
    assert profile.tensorrt is not None
    assert (profile.power_mode, profile.tensorrt.workspace_mb, profile.memory_mb) == ("15W", 1024, 4000)


def test_other_pages_lead_there() -> None:
    assert "docs/profiles.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(profiles.md)" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
