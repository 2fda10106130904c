"""devices.toml: what is added, what stays, what a broken file says, and that a host is never an option of ssh."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekd.devices import DIRECTORY, Device, add_device, devices_file, find_device, known_devices
from edgekd.errors import RecipeError, StageError, UsageError

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "edgekd" / "devices.toml"


def test_what_is_added_is_found_by_name_and_any_host_by_itself(file: Path) -> None:
    assert known_devices() == {}
    orin = Device(name="orin", host="me@10.0.0.5", profile="cpu-arm64", python="~/venv/bin/python", port=2222)
    assert add_device(orin) == file == devices_file()
    add_device(Device(name="pi", host="pi"))
    assert list(known_devices()) == ["orin", "pi"]
    assert find_device("orin") == orin
    assert find_device("somebody@elsewhere") == Device(name="somebody@elsewhere", host="somebody@elsewhere")
    assert find_device("pi").directory == DIRECTORY
    assert stat.S_ISREG(file.stat().st_mode)
    assert [p.name for p in file.parent.iterdir()] == ["devices.toml"]  # and no temporary file


def test_replacing_a_device_leaves_the_rest_of_the_file_as_it_is(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text('# mine\n[a]\nhost = "x@a"  # old\nport = 1\n\n# about b\n[b]\nhost = "x@b"\n')
    add_device(Device(name="a", host="y@a", python='odd "name" \\ ü'))
    text = file.read_text()
    assert text.startswith("# mine\n[a]\n")
    assert '# about b\n[b]\nhost = "x@b"' in text
    assert known_devices()["a"] == Device(name="a", host="y@a", python='odd "name" \\ ü')
    assert known_devices()["b"].host == "x@b"


def test_a_device_that_is_written_in_another_way_is_left_to_its_writer(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text('a = { host = "x@a" }\n')
    with pytest.raises(UsageError, match="a way of its own"):
        add_device(Device(name="a", host="y@a"))
    assert file.read_text() == 'a = { host = "x@a" }\n'


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=touch here", "-l", "me@-oX", "a b", "a;b", "$(x)", "me@", "", "a\nb", "`x`", "a'b", "@a", "a/b"],
)
def test_a_host_that_is_none_is_refused_everywhere(host: str, file: Path) -> None:
    with pytest.raises(UsageError, match="not a host"):
        find_device(host)
    with pytest.raises(UsageError, match="not a host"):
        add_device(Device(name="x", host=host))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"[x]\nhost = {json.dumps(host)}\n")
    with pytest.raises(UsageError, match="not a host"):
        find_device("x")


@pytest.mark.parametrize(
    "host", ["me@10.0.0.5", "orin", "me@[fe80::1%eth0]", "fe80::1%eth0", "a.b-c_d", "first.last+x@h"]
)
def test_hosts_that_ssh_takes_are_taken(host: str) -> None:
    assert find_device(host).host == host


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a\n", "not valid TOML"),
        ('[a]\nhots = "x"\n', "a.hots: unknown key"),
        ("[a]\n", "a.host: missing"),
        ("a = 3\n", "a: must be a table"),
        ('[a]\nhost = "x"\nport = 70000\n', "a.port"),
        ('["a b"]\nhost = "x"\n', "not a name"),
        (b"\xff\xfe", "not a text file"),
    ],
)
def test_a_broken_file_is_one_message_with_its_place(text: str | bytes, said: str, file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = file.read_bytes()
    for call in (known_devices, lambda: find_device("a"), lambda: add_device(Device(name="z", host="z"))):
        with pytest.raises(UsageError, match=said) as raised:
            call()
        assert str(file) in str(raised.value)
    assert file.read_bytes() == before


def test_all_problems_of_the_file_at_once(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("[a]\n[b]\nport = -1\nhost = 'b'\n[c]\nhost = '-x'\n")
    with pytest.raises(RecipeError) as raised:
        known_devices()
    assert len(raised.value.problems) == 3


def test_a_file_that_cannot_be_written_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/sys")  # where root may not make files either
    with pytest.raises(StageError, match="cannot write"):
        add_device(Device(name="a", host="a"))


def test_the_commands(edgekd: Call, file: Path) -> None:
    assert edgekd("devices", "list").out == ""
    done = edgekd("devices", "add", "orin", "me@orin", "--profile", "cpu-arm64", "--port", "2222")
    assert done.code == 0, done.err
    assert str(file) in done.err
    done = edgekd("devices", "list")
    assert [line.split() for line in done.out.splitlines()] == [
        ["name", "host", "profile", "python", "directory"],
        ["orin", "me@orin", "(port", "2222)", "cpu-arm64", "python3", DIRECTORY],
    ]
    document = json.loads(edgekd("devices", "list", "--json").out)
    assert document["version"] == 1
    assert document["devices"] == [known_devices()["orin"].model_dump()]
    wrong = edgekd("devices", "add", "orin", "me@orin", "--profile", "cpu-amr64")
    assert wrong.code == 2
    assert "did you mean 'cpu-arm64'?" in wrong.err
    assert edgekd("devices", "add", "a b", "host").code == 2
    empty = edgekd("devices", "add", "a", "host", "--python", "")
    assert empty.code == 2
    assert "--python: " in empty.err
    refused = edgekd("bench", "x.onnx", "--host", "-oProxyCommand=x", "--profile", "cpu-x86")
    assert refused.code == 2
    assert "not a host" in refused.err
    near = edgekd("bench", "x.onnx", "--host", "me@-orin")
    assert near.code == 2
