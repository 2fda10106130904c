"""`edgekd profiles`: list, show, check and detect."""

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

from edgekd.profile import load_profile, profile_names

Call = Callable[..., Any]


@pytest.mark.parametrize("command", ["list", "show", "check", "detect"])
def test_every_command_has_help_with_an_example(edgekd: Call, command: str) -> None:
    done = edgekd("profiles", command, "--help")
    assert done.code == 0
    assert re.search(rf"Example: edgekd profiles {command}( .+)?$", done.out.replace("│", ""), re.MULTILINE), done.out


def test_no_command_is_a_usage_error_and_others_are_named(edgekd: Call) -> None:
    assert edgekd("profiles").code == 2
    shown = edgekd("profiles", "--help")
    assert shown.code == 0
    assert set(re.findall(r"^│ (\w+) ", shown.out, re.MULTILINE)) == {"list", "show", "check", "detect"}


def test_the_list_has_every_profile_and_says_what_this_machine_is(edgekd: Call) -> None:
    done = edgekd("profiles", "list")
    assert (done.code, done.err) == (0, "")
    head, *rows = done.out.splitlines()
    assert head.split()[:4] == ["profile", "device", "runtime", "precisions"]
    assert [row.split()[0] for row in rows] == profile_names()
    assert "tensorrt 10.3" in next(row for row in rows if row.startswith("jetson-orin-nano-8gb "))
    document = json.loads(edgekd("profiles", "list", "--json").out)
    assert document["version"] == 1
    found = {row["name"]: row for row in document["profiles"]}
    assert list(found) == profile_names()
    assert not found["jetson-thor"]["here"]
    assert found["jetson-thor"]["why"]
    assert all(row["here"] == (row["why"] is None) for row in document["profiles"])
    # `edgekd list profiles` says the same of what they are.
    assert [line.split()[0] for line in edgekd("list", "profiles").out.splitlines()] == profile_names()


@pytest.mark.parametrize("arguments", [["list"], ["show", "gpu-t4"], ["check", "gpu-t4"], ["detect"]])
def test_nothing_of_it_waits_for_torch_or_onnx(arguments: list[str]) -> None:
    script = (
        "import sys, edgekd.cli\n"
        f"sys.argv = ['edgekd', 'profiles', *{arguments!r}]\n"
        "try: edgekd.cli.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'sklearn', 'accelerate'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_shown_loads_again_equal(edgekd: Call, tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    shown = edgekd("profiles", "show", "jetson-orin-nano-8gb-super")
    file.write_text(shown.out)
    assert load_profile(str(file)) == load_profile("jetson-orin-nano-8gb-super")
    assert "extends" not in tomllib.loads(shown.out)
    document = json.loads(edgekd("profiles", "show", str(file), "--json").out)
    assert document["profile"]["datasheet"]["int8_tops"] == 33.0
    unknown = edgekd("profiles", "show", "jetson-orin-nano")
    assert unknown.code == 2
    assert "did you mean 'jetson-orin-nano-8gb'?" in unknown.err


WRONG = """\
extends = "jetson-agx-orin-64gb"
threds = 3
scheme = "trt-s8s9"
[tensorrt]
version = "10.16"
dla = 0
[protocol]
rounds = 1
[budgets]
latencyy = { p50 = { max = 1.0 } }
"""
ODD = """\
extends = "jetson-orin-nano-8gb"
scheme = "x86-u8s8"
opset = 21
lacks = ["avx512vnni"]
[tensorrt]
version = "10.4"
jetpack = "6.9"
[budgets]
miou = { min = 0.5 }
"""


def test_everything_that_is_wrong_with_files_is_told_at_once(edgekd: Call, tmp_path: Path) -> None:
    wrong, none = tmp_path / "wrong.toml", tmp_path / "none.toml"
    wrong.write_text(WRONG)
    done = edgekd("profiles", "check", str(wrong), str(none), "cpu-x86")
    assert done.code == 2
    assert done.out == "ok  cpu-x86\n"
    found = done.err.replace("\n", " ")
    place = f"profile {wrong}: "
    for said in (
        f"{place}threds: unknown key",
        f"{place}scheme: no quantization scheme 'trt-s8s9'",
        f"{place}tensorrt.version: JetPack 6.2 has TensorRT 10.3.0 (10.6 or 10.7 may be installed on it), got 10.16",
        f"{place}protocol.rounds: input should be greater than or equal to 3, got 1",
        f"{place}budgets.latencyy: unknown key",
        f"{place}tensorrt.version: TensorRT 10.16 has no DLA: 10.7 was the last before 11.4",
        f"no such file: '{none}'",
    ):
        assert said in found
    assert "error: 7 problems" in found
    assert "hint: TensorRT 10.16 goes with JetPack 7.2.2" in found
    document = json.loads(edgekd("profiles", "check", str(wrong), "cpu-x86", "--json").out)
    assert [len(file["problems"]) for file in document["files"]] == [6, 0]
    assert edgekd("profiles", "check", str(wrong), "--json").code == 2


def test_what_is_odd_is_a_warning(edgekd: Call, tmp_path: Path) -> None:
    odd = tmp_path / "odd.toml"
    odd.write_text(ODD)
    done = edgekd("profiles", "check", str(odd))
    assert (done.code, done.out) == (0, f"ok  {odd}\n")
    keys = [line.partition(f"{odd}: ")[2].partition(":")[0] for line in done.err.splitlines() if "warning" in line]
    assert keys == ["budgets.miou", "lacks", "scheme", "opset", "tensorrt.jetpack"]
    assert "TensorRT 10.4 takes ONNX up to opset 20, got 21" in done.err
    assert "hint: did you mean 'avx512_vnni'?" in done.err
    assert "hint: the nearest that is known: 6.2.3" in done.err
    assert "hint: trt-s8s8" in done.err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('extends = "cpu-arm64"\nscheme = "x86-u8s8"', "onnxruntime on aarch64 does not fuse x86-u8s8"),
        ('extends = "cpu-x86"\nscheme = "trt-s8s8"', "onnxruntime on x86-64 does not fuse trt-s8s8"),
        (
            'extends = "gpu-l4"\nopset = 17',
            "TensorRT 11.4 takes types from the file, and fp16 scales are in ONNX",
        ),
        (
            'description = "a"\nruntime = "tensorrt"\nscheme = "trt-s8s8"',
            "tensorrt: not said which: its version",
        ),
        ('description = "a"\ndevice = "jetson"', "power_mode: a Jetson's figures hold in one power mode"),
        ('extends = "gpu-l4"\nopset = 17\n[tensorrt]\nversion = "8.4"', "older than 8.5 was never looked at, got 8.4"),
    ],
)
def test_more_that_is_odd(edgekd: Call, tmp_path: Path, lines: str, said: str) -> None:
    file = tmp_path / "odd.toml"
    file.write_text(lines)
    done = edgekd("profiles", "check", str(file))
    assert done.code == 0
    assert said in done.err


def test_a_profile_for_this_machine_is_written_and_right(edgekd: Call, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    done = edgekd("profiles", "detect", "-o", str(file))
    assert (done.code, done.out) == (0, "")
    assert f"written: {file}" in done.err.replace("\n", "")
    assert edgekd("profiles", "check", str(file)).out == f"ok  {file}\n"
    shown = edgekd("profiles", "detect")
    assert tomllib.loads(shown.out) == tomllib.loads(file.read_text())
    document = json.loads(edgekd("profiles", "detect", "--json").out)
    assert document["profile"] == tomllib.loads(shown.out)
    refused = edgekd("profiles", "detect", "-o", str(tmp_path / "mine"))
    assert refused.code == 2
    assert "must end in .toml" in refused.err
