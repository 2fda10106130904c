"""Bundles that are damaged, answer wrongly or are somebody else's, measured over ssh: one message each."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import Server
from small_bench import there, variants

from edgekd.bundle import make_bundle
from edgekd.bundle.packing import packed
from edgekd.profile import load_profile

Call = Callable[..., Any]


@pytest.fixture
def bundle(work: Path, tmp_path: Path) -> Path:
    """A bundle whose runner tests replace."""
    return make_bundle([work / "fitted.onnx"], tmp_path / "own", load_profile(str(work / "quick.toml")), None)


def with_runner(bundle: Path, text: str) -> None:
    """Another run.py, as the manifest says."""
    (bundle / "run.py").write_text(text)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"]["run.py"] = [hashlib.sha256(text.encode()).hexdigest(), len(text.encode())]
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def test_a_bundle_that_is_damaged_here_is_not_sent(server: Server, bundle: Path, edgekd: Call) -> None:
    (bundle / "fitted.onnx").write_bytes((bundle / "fitted.onnx").read_bytes()[:-1] + b"\0")
    damaged = edgekd("bench", str(bundle), "--host", "device")
    assert damaged.code == 3
    assert "fitted.onnx is corrupted" in damaged.err
    (bundle / "bundle.json").write_text("{")
    assert "the manifest is damaged" in edgekd("bench", str(bundle), "--host", "device").err
    assert there(server) == []


def test_a_runner_that_fails_is_quoted_and_the_next_call_begins_anew(
    server: Server, bundle: Path, edgekd: Call
) -> None:
    with_runner(bundle, "import sys\nprint('no such \\33[31mkernel')\nsys.exit('and no hope')\n")
    for _ in range(2):
        failed = edgekd("bench", str(bundle), "--host", "device")
        assert failed.code == 3
        assert "the runner failed with status 1" in failed.err
        assert "no such [31mkernel" in failed.err  # without what would steer the terminal
        assert "and no hope" in failed.err
        assert "has run on device meanwhile" not in failed.err


def test_results_of_another_bundle_are_not_taken(server: Server, bundle: Path, edgekd: Call) -> None:
    done = edgekd("bench", str(bundle), "--host", "device", "--keep")
    assert done.code == 0, done.err
    [home] = there(server)
    other = (home / "results.json").read_text().replace('"bundle":"', '"bundle":"0')
    with_runner(bundle, f"open('results.json', 'w').write({other!r})\n")
    refused = edgekd("bench", str(bundle), "--host", "device")
    assert refused.code == 3
    assert "the results of another bundle" in refused.err
    assert len(there(server)) == 2  # what it wrote is still there
    again = edgekd("bench", str(bundle), "--host", "device")
    assert "has run on device meanwhile" not in again.err  # the wrong results are not read twice


def test_a_profile_or_a_network_that_the_device_changed_is_refused(
    server: Server, bundle: Path, tmp_path: Path, edgekd: Call
) -> None:
    runner = (bundle / "run.py").read_text()
    told = "import json\nwritten = json.load(open('results.json'))\n{}\njson.dump(written, open('results.json', 'w'))"
    for change, what in (
        ("written['manifest']['profile']['description'] = 'faster'", "profile differs"),
        ("written['manifest']['networks'][0]['parameters'] = 1", "networks differs"),
        ("written['rounds'][0]['networks']['fitted']['ns'] = [-1]", "latencies of round 1 must be positive"),
    ):
        ending = "import atexit\n\n\n@atexit.register\ndef change() -> None:\n" + "".join(
            f"    {line}\n" for line in told.format(change).splitlines()
        )
        marker = 'if __name__ == "__main__":'
        assert marker in runner
        with_runner(bundle, runner.replace(marker, f"{ending}\n\n{marker}"))
        out = tmp_path / "results.json"
        refused = edgekd("bench", str(bundle), "--host", "device", "-o", str(out))
        assert refused.code == 3
        assert what in refused.err
        assert "results of device" in refused.err
        assert not out.exists()


def test_one_network_of_several_that_is_wrong_leaves_the_others_their_figures(
    server: Server, work: Path, tmp_path: Path, edgekd: Call
) -> None:
    bundle = make_bundle(
        [work / "fitted.onnx", work / "noisy.onnx"], tmp_path / "two", load_profile(str(work / "quick.toml")), None
    )
    expected = dict(np.load(bundle / "expected.npz"))
    np.savez(bundle / "expected.npz", **{**expected, "noisy.y": expected["noisy.y"] * 3})
    manifest = json.loads((bundle / "bundle.json").read_text())
    content = (bundle / "expected.npz").read_bytes()
    manifest["files"]["expected.npz"] = [hashlib.sha256(content).hexdigest(), len(content)]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    out = tmp_path / "results.json"
    done = edgekd("bench", str(bundle), "--host", "device", "-o", str(out))
    assert done.code == 3
    assert "error: noisy did not run there" in done.err
    assert "outputs differ from ONNX Runtime's" in done.err
    found = variants(out)
    assert found["noisy"]["latency"] is None
    assert found["fitted"]["latency"]["p50"]["value"] > 0
    assert there(server) == []


def test_a_bundle_brings_its_profile(server: Server, bundle: Path, edgekd: Call) -> None:
    wrong = edgekd("bench", str(bundle), "--host", "device", "--profile", "cpu-x86")
    assert wrong.code == 2
    assert "was made for quick" in wrong.err
    for ending in (".tar.gz", ".tar.zst"):
        archive = bundle.with_name(f"packed{ending}")
        packed(bundle, "packed", archive)
        wrong = edgekd("bench", str(archive), "--host", "device", "--profile", "cpu-x86")
        assert "was made for quick" in wrong.err
        archive.write_bytes(archive.read_bytes()[:2000])
        damaged = edgekd("bench", str(archive), "--host", "device")
        assert damaged.code == 3
        assert "damaged: " in damaged.err
    for twice, what in (
        ("run.py", "two files are called run.py"),
        ("fitted.onnx", "fitted.onnx has 1,000,000 bytes, expected "),
        ("bundle.json", "bundle.json has 20,000,000 bytes, expected 10,000,000 at most"),
    ):
        archive = bundle.with_name("other.tar.gz")
        with tarfile.open(archive, "w:gz") as tar:
            if twice != "run.py":
                added = tarfile.TarInfo(f"b/{twice}")
                added.size = 1_000_000 if twice == "fitted.onnx" else 20_000_000
                tar.addfile(added, io.BytesIO(bytes(added.size)))
            tar.add(bundle, "b")
            tar.add(bundle / "run.py", "other/run.py")
        refused = edgekd("bench", str(archive), "--host", "device")
        assert refused.code == 3
        assert what in refused.err
        assert not there(server)
    none = edgekd("bench", "x.onnx", "--host", "device")
    assert none.code == 2
    assert "is measured as one profile, got none" in none.err
    assert edgekd("bench", "x.onnx", "--keep").code == 2
