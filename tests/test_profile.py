"""Hardware profiles: shipped ones, files of the user's, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.errors import RecipeError, UsageError
from edgekd.profile import Profile, Protocol, load_profile, profile_names, profile_toml


def test_every_shipped_profile_loads_and_is_called_like_its_file() -> None:
    assert "cpu-x86" in profile_names()
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.description


def test_a_profile_extends_another_and_merges_its_protocol(tmp_path: Path) -> None:
    base = load_profile("cpu-x86")
    file = tmp_path / "board.toml"
    file.write_text('extends = "cpu-x86"\nthreads = 3\n[protocol]\nrounds = 5\n')
    board = load_profile(str(file))
    changed = base.protocol.model_copy(update={"rounds": 5})
    assert board == base.model_copy(update={"name": "board", "threads": 3, "protocol": changed})
    second = tmp_path / "second.toml"
    second.write_text(f'extends = "{file}"\nname = "other"\n[protocol]\nblock_s = 0.5\n')
    other = load_profile(str(second))
    assert (other.name, other.threads, other.protocol.rounds, other.protocol.block_s) == ("other", 3, 5, 0.5)


def test_every_table_is_merged_by_key_and_lists_are_not(tmp_path: Path) -> None:
    base = load_profile("jetson-agx-orin-64gb")
    file = tmp_path / "board.toml"
    file.write_text(
        'extends = "jetson-agx-orin-64gb"\nprecisions = ["fp16"]\n'
        "[tensorrt]\nworkspace_mb = 512\n[datasheet]\nbandwidth_gb_s = 100.0\n[budgets]\nsize_mb = { max = 1.0 }\n"
    )
    board = load_profile(str(file))
    assert base.tensorrt is not None
    assert base.datasheet is not None
    assert board.tensorrt == base.tensorrt.model_copy(update={"workspace_mb": 512})
    assert board.datasheet == base.datasheet.model_copy(update={"bandwidth_gb_s": 100.0})
    assert (board.precisions, board.budgets) == (["fp16"], {"size_mb": {"max": 1.0}})
    second = tmp_path / "second.toml"
    second.write_text(f'extends = "{file}"\n[budgets]\nload_ms = {{ max = 9.0 }}\n')
    assert load_profile(str(second)).budgets == {"size_mb": {"max": 1.0}, "load_ms": {"max": 9.0}}


def test_a_profile_of_ones_own_needs_a_description_only(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('description = "mine"\n')
    assert load_profile(str(file)) == Profile(name="mine", description="mine", protocol=Protocol())


def test_any_text_and_any_budget_is_written_as_toml_that_loads_equal(tmp_path: Path) -> None:
    file = tmp_path / "odd.toml"
    profile = Profile(
        name="odd",
        description='a "quoted" name\\with\ttabs,\nlines, \x7f and \u00e9',
        budgets={"latency": {"p50": {"max": 1e-3}}, "a b": {"min": 0.5, "strict": True}},
    )
    file.write_text(profile_toml(profile), encoding="utf-8")
    assert load_profile(str(file)) == profile


def fails(name: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_profile(name, "profiles[0]")
    assert caught.value.exit_code == 2
    return caught.value


def test_unknown_names() -> None:
    error = fails("cpu-x68")
    assert (error.problem.where, error.problem.what) == ("profiles[0]", "no profile 'cpu-x68'")
    assert error.problem.hint == "did you mean 'cpu-x86'?"


@pytest.mark.parametrize("name", ["none.toml", "boards/none", "bad.onnx"])
def test_a_file_that_is_not_there_is_not_taken_for_a_shipped_name(name: str) -> None:
    error = fails(name)
    assert error.problem.what == f"no such file: {name!r}"
    assert "jetson" not in str(error.problem.hint), "shipped names are not what was meant"


def test_another_file_is_no_profile(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"onnx")
    assert "is no profile: its file ends in .toml" in fails(str(tmp_path / "bad.onnx")).problem.what


def test_a_directory_is_no_profile(tmp_path: Path) -> None:
    (tmp_path / "d.toml").mkdir()
    assert "directory" in str(fails(str(tmp_path / "d.toml")).problem.hint)


def test_circles(tmp_path: Path) -> None:
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text(f'extends = "{b}"\n')
    b.write_text(f'extends = "{a}"\n')
    error = fails(str(a))
    assert error.problem.what == f"profiles extend each other in a circle: {a} -> {b} -> {a}"
    assert error.problem.hint
    a.write_text(f'extends = "{a}"\n')
    assert f"{a} -> {a}" in fails(str(a)).problem.what


@pytest.mark.parametrize("content", [b"description = ", b"\xff"])
def test_not_toml(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    error = fails(str(file))
    assert error.problem.where == str(file)
    assert "not valid TOML" in error.problem.what


def test_extends_that_is_no_name(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("extends = 3\n")
    assert fails(str(file)).problem.what == "extends must name a profile, got 3"


def test_all_that_is_wrong_with_the_fields_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(
        'extends = "cpu-x86"\nthreds = 1\nopset = 12\ndevice = "fpga"\n[protocol]\nrounds = 1\nwarmup = 0\n'
    )
    error = fails(str(file))
    assert isinstance(error, RecipeError)
    found = {p.where.removeprefix(f"profile {file}: "): p for p in error.problems}
    assert set(found) == {"threds", "opset", "device", "protocol.rounds", "protocol.warmup"}
    assert found["threds"].hint == "did you mean 'threads'?"
    assert found["protocol.warmup"].hint == "did you mean 'warmup_s'?"
    assert "'cpu', 'gpu' or 'jetson', got 'fpga'" in found["device"].what


@pytest.mark.parametrize(
    ("lines", "key", "what", "hint"),
    [
        (
            'version = "8.6"',
            "tensorrt.version",
            "JetPack 6.2 has TensorRT 10.3.0 (10.6 or 10.7 may be installed on it), got 8.6",
            "TensorRT 8.6 goes with JetPack 6.0",
        ),
        (
            'jetpack = "6.0"',
            "tensorrt.version",
            "JetPack 6.0 has TensorRT 8.6.2, got 10.3",
            "TensorRT 10.3 goes with JetPack 6.2.3",
        ),
        (
            'jetpack = "7.1"\nversion = "10.13"',
            "tensorrt.jetpack",
            "JetPack 7.1 is for boards of compute capability 11.0, got 8.7",
            "for 8.7: 5.1, 5.1.1, 5.1.2, 5.1.3, 5.1.4, 5.1.5, 6.0, 6.1, 6.2, 6.2.1, 6.2.2, 6.2.3, 7.2, 7.2.1, 7.2.2",
        ),
        (
            "dla = 2",
            "tensorrt.dla",
            "no such accelerator: the device has 2, counted from 0, got 2",
            "leave it out to build for the GPU",
        ),
    ],
)
def test_what_cannot_be_together(lines: str, key: str, what: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    file.write_text(f'extends = "jetson-agx-orin-64gb"\n[tensorrt]\n{lines}\n')
    (problem,) = fails(str(file)).problems
    assert (problem.where, problem.what, problem.hint) == (f"profile {file}: {key}", what, hint)


@pytest.mark.parametrize(
    "lines", ['version = "10.7"', 'version = "10.3.0"', 'jetpack = "6.9"\nversion = "9.9"', "dla = 1"]
)
def test_what_can_be_together(lines: str, tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    file.write_text(f'extends = "jetson-agx-orin-64gb"\n[tensorrt]\n{lines}\n')
    assert load_profile(str(file)).tensorrt is not None


def test_contradictions_are_told_beside_wrong_keys(tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    file.write_text('extends = "jetson-agx-orin-64gb"\naffinity = ["a"]\n[tensorrt]\nversion = "8.6"\ndla = 2\n')
    keys = [p.where.removeprefix(f"profile {file}: ") for p in fails(str(file)).problems]
    assert keys == ["affinity[0]", "tensorrt.version", "tensorrt.dla"]
    file.write_text('extends = "jetson-agx-orin-64gb"\n[tensorrt]\nversion = "eleven"\n')  # nothing to compare with
    assert [p.where for p in fails(str(file)).problems] == [f"profile {file}: tensorrt.version"]


def test_a_protocol_that_is_no_table(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('extends = "cpu-x86"\nprotocol = 5\n')
    (problem,) = fails(str(file)).problems
    assert problem.where.endswith(": protocol")
    assert problem.what == "must be a table, got 5"
