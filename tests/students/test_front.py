"""A family measured on a profile: the shapes, the ratios across sessions, the front, and what is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import EdgekdError, UsageError
from edgekd.models import build, count
from edgekd.profile import Profile, load_profile
from edgekd.report.students import students_html, students_text
from edgekd.students import fronts, table
from edgekd.students.families import FAMILIES, candidates
from edgekd.students.front import on_front

SIZE = [1, 8, 8]


def _rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["fronts"][0]["candidates"]}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_shape_of_a_family_builds_and_most_widths_are_what_the_kernels_like(family: str) -> None:
    found = candidates(family, 16, [3, 32, 32], 10)
    assert len({c.name for c in found}) == len(found)
    assert 6 <= len(found) <= 16
    for candidate in found:
        build(candidate.spec)
    if family != "mobilenet":
        liked = [c for c in found if c.width % 16 == 0]
        assert len(found) / 2 < len(liked) < len(found)  # the others are controls


def test_shapes_that_are_asked_for_are_every_combination() -> None:
    found = candidates("cifar-resnet", 16, SIZE, 10, depths=[14, 8], widths=[8, 16])
    assert [c.name for c in found] == [f"cifar-resnet-{d}x{w}" for d in (8, 14) for w in (8, 16)]
    assert found[-1].args == {"depth": 14, "width": 16}
    assert [c.args for c in candidates("vit", 16, SIZE, 10, depths=[2], widths=[48])] == [
        {"depth": 2, "dim": 48, "heads": 1, "patch": 4}
    ]


@pytest.mark.parametrize("multiple", [1, 8, 16, 32, 64])
def test_the_widths_of_a_profile_with_another_multiple_are_its_multiples(multiple: int) -> None:
    widths = {c.width for c in candidates("cifar-resnet", multiple, SIZE, 10)}
    step = max(multiple, 16)
    assert {w for w in widths if w % step} == {step // 2, 3 * step // 2}


@pytest.mark.parametrize(
    ("arguments", "where", "what"),
    [
        ({"family": "cifar-resnets"}, "--family", "no family"),
        ({"family": "mobilenet", "depths": [8]}, "--depths", "one depth only"),
        ({"family": "cifar-resnet", "widths": [8.5]}, "--widths", "whole numbers"),
        ({"family": "cifar-resnet", "depths": [9]}, "--depths", "6n+2"),
        ({"family": "vit", "precisions": ["int4"]}, "--precision", "'int4' is not measured on cpu-x86"),
        ({"family": "vit", "profiles": ["cpu-x68"]}, "--profile", "no profile 'cpu-x68'"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(
    clock: Any, arguments: dict[str, Any], where: str, what: str
) -> None:
    arguments = {"profiles": [], **arguments}
    with pytest.raises(EdgekdError) as found:
        fronts(arguments.pop("family"), arguments.pop("profiles"), **arguments)
    assert found.value.problems[0].where == where
    assert what in found.value.problems[0].what
    assert clock.sessions == []


def test_a_profile_of_another_machine_says_where_to_measure(clock: Any, tmp_path: Path) -> None:
    file = tmp_path / "far.toml"
    file.write_text('extends = "cpu-x86"\ndescription = "far"\nrequires = ["sme9"]\n')
    with pytest.raises(UsageError, match=r"far has sme9, this machine has not\n.*on the device"):
        fronts("cifar-resnet", [str(file)], size=SIZE, depths=[8], widths=[8])


def test_figures_of_several_sessions_are_on_one_scale(clock: Any) -> None:
    """Each session is slower than the one before: the ratios to what is in all of them are not."""
    document = fronts("cifar-resnet", [], size=SIZE, depths=[8, 14, 20, 26], widths=[16, 24, 32])
    assert [len(files) for files in clock.sessions] == [8, 8, 8]
    scale = document["fronts"][0]["against"]["p50_ms"]["value"] / clock.formula({"depth": 20, "width": 16}, "fp32")
    for row in document["fronts"][0]["candidates"]:
        for precision, found in row["precisions"].items():
            expected = clock.formula(row["args"], precision)
            assert found["p50_ms"]["value"] == pytest.approx(scale * expected)
            assert found["p50_ms"]["low"] <= found["p50_ms"]["value"] <= found["p50_ms"]["high"]
            assert found["speedup"]["value"] == pytest.approx(
                clock.formula({"depth": 20, "width": 16}, "fp32") / expected
            )


def test_the_front_is_what_nothing_else_beats(clock: Any) -> None:
    document = fronts("cifar-resnet", [], size=SIZE, depths=[8, 14], widths=[8, 16, 24])
    rows = document["fronts"][0]["candidates"]
    # In int8 by the formula 8 channels cost as much as 16, and 24 as much as 32.
    assert {row["name"] for row in rows if row["front"]} == {f"cifar-resnet-{d}x{w}" for d in (8, 14) for w in (16, 24)}
    times = [row["precisions"]["int8"]["p50_ms"]["value"] for row in rows]
    assert times == sorted(times)
    for row in rows:
        assert (row["parameters"], row["macs"]) == count(build(candidates(
            "cifar-resnet", 16, SIZE, 10, depths=[row["depth"]], widths=[row["width"]])[0].spec), SIZE)  # fmt: skip


def test_a_table_from_a_busy_machine_says_so_whenever_it_is_read(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "others_busy", lambda: lambda: 1.5)
    measured = fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8])["fronts"][0]
    monkeypatch.setattr(table, "others_busy", lambda: lambda: 0.0)
    for front in (measured, fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8])["fronts"][0]):
        assert any("other programs kept 1.5 of" in warning for warning in front["warnings"])
    again = fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8], again=True)["fronts"][0]
    assert not any("busy" in warning for warning in again["warnings"])


def test_measuring_again_clears_what_was_busy_of_what_it_measures_alone(
    clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(widths: list[float], cores: float, again: bool = False) -> float:
        monkeypatch.setattr(table, "others_busy", lambda: lambda: cores)
        found = fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=widths, again=again)["fronts"][0]
        return float(found["busy"])

    assert busy([8, 16], 1.5) == 1.5
    assert busy([8], 0.0, again=True) == 0.0
    assert busy([8], 0.7) == 0.0, "read, not measured"
    assert busy([16], 0.0) == busy([8, 16], 0.0) == 1.5, "kept from the first session"
    assert busy([8, 16, 24], 0.3) == 1.5
    assert busy([24], 0.0) == 0.3


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(5, 1.0, 1.0), (5, 1.0, 1.0), (4, 1.0, 1.0), (5, 2.0, 2.0)], [True, True, False, False]),
        ([(4, 1.0, 1.1), (5, 1.2, 1.3)], [True, True]),
        ([(4, 1.0, 1.2), (5, 1.1, 1.3)], [False, True]),  # the same latency, for all that is known
    ],
)
def test_the_front_by_intervals(points: list[tuple[int, float, float]], front: list[bool]) -> None:
    rows = [{"macs": m, "precisions": {"fp32": {"p50_ms": {"value": t, "high": high}}}} for m, t, high in points]
    assert on_front(rows, "fp32") == front


def test_what_is_known_is_not_measured_again_and_more_is_added(clock: Any) -> None:
    first = fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8])
    more = fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8, 16])
    assert [len(files) for files in clock.sessions] == [2, 2]
    assert first["fronts"][0]["cache"] == more["fronts"][0]["cache"]
    again = fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8, 16])
    assert len(clock.sessions) == 2
    assert again == more
    fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8, 16], again=True)
    assert len(clock.sessions) == 3
    fronts("cifar-resnet", [], size=[1, 16, 16], depths=[8], widths=[8])
    assert len(clock.sessions) == 4  # other images, other latencies


def test_another_setting_of_the_profile_is_another_table(clock: Any, tmp_path: Path) -> None:
    places = set()
    for settings in ("", "threads = 2", "affinity = [0]", "[protocol]\nbatch = 8", "channel_multiple = 8"):
        file = tmp_path / "one.toml"
        file.write_text(f'extends = "cpu-x86"\ndescription = "one"\n{settings}\n')
        places.add(fronts("cifar-resnet", [str(file)], size=SIZE, depths=[8], widths=[8])["fronts"][0]["cache"])
    assert len(places) == 4  # the multiple changes no latency


def test_a_damaged_table_is_measured_anew(clock: Any) -> None:
    document = fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8])
    file = Path(document["fronts"][0]["cache"])
    file.write_text(file.read_text()[:100])
    fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8])
    assert len(clock.sessions) == 2
    assert json.loads(file.read_text())["entries"]


def test_a_home_that_cannot_be_written_to_changes_nothing(
    clock: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(_rows(fronts("cifar-resnet", [], size=SIZE, depths=[8], widths=[8]))) == 1


def test_the_page_and_the_table_say_how_it_was_measured(clock: Any) -> None:
    document = fronts("cifar-resnet", [], size=SIZE, depths=[8, 14], widths=[8, 16])
    front = document["fronts"][0]
    text, page = students_text(document), students_html(document)
    for told in ("cpu-x86", "1 thread", front["device"], front["runtime"], front["measured"], "5 rounds"):
        assert told in text
        assert told in page
    assert "not its accuracy" in text
    assert "not its accuracy" in page
    starred = [line.split()[1] for line in text.splitlines() if line.startswith("*  ")]
    assert starred == [row["name"] for row in front["candidates"] if row["front"]]
    assert page.count("<circle") == 2 * 2 * len(front["candidates"])  # on wide pages and on phones
    for row in front["candidates"]:
        p50 = row["precisions"]["int8"]["p50_ms"]
        found = re.search(rf"{row['name']} int8: (\S+) ms \[(\S+), (\S+)\]", page)
        assert found
        expected = [p50["value"], p50["low"], p50["high"]]
        assert [float(figure) for figure in found.groups()] == pytest.approx(expected, rel=0.005)
    assert "<script" not in page


def test_three_real_networks_are_measured_in_their_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(table, "CAP_S", 1.0)
    profile: Profile = load_profile("cpu-x86")
    shapes = candidates("cifar-resnet", 16, SIZE, 10, depths=[8], widths=[4, 64])
    narrow, wide = (shape.spec for shape in shapes)
    told: list[tuple[int, int]] = []
    wanted = [(narrow, "int8"), (wide, "fp32")]
    found, file = table.table_of("cifar-resnet", profile, SIZE, 10, wanted, progress=lambda *x: told.append(x))
    assert told == [(1, 2), (2, 2)]
    fast, slow = (found.entries[table.entry_key(*one)] for one in wanted)
    assert slow.ratio.low > 3 * fast.ratio.high  # 240 times the work
    assert fast.ratio.high < 1  # the reference has 20 layers of 16
    assert slow.rounds >= 3
    assert slow.size_mb == pytest.approx(4 * slow.parameters / 1e6, rel=0.1)
    assert fast.parameters < slow.parameters / 200
    assert found.reference == "cifar-resnet-20x16 fp32"
    assert table.Table.model_validate_json(file.read_text()) == found
