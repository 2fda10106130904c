"""The wheel holds all that edgekd needs, and runs the demo where no checkout is in sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROFILE = (
    'extends = "cpu-x86"\n[protocol]\nrounds = 3\nprecision = 10.0\nblock_s = 0.01\nwarmup_s = 0.01\nbatches = [1]\n'
)
QUICK = {
    "profiles": '["profile.toml"]',
    "data.use": "digits",
    "data.validation": 0.7,  # fewer images to train on
    "teacher.epochs": 1,
    "stage.distill.epochs": 1,
    "stage.prune.heal.epochs": 0,
    "stage.quantize.heal.epochs": 0,
    "stage.quantize.keep_float": "false",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    ran("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT))
    [file] = out.glob("*.whl")
    return file


def ran(*arguments: str, python: str = sys.executable, cwd: Path | None = None) -> str:
    done = subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(f.relative_to(ROOT)) for f in (ROOT / "edgekd").rglob("*") if f.is_file() and f.suffix != ".pyc"}
    assert code <= names
    assert {"edgekd/py.typed", "edgekd/report/template.html.j2", "edgekd/report/style.css"} <= names
    for kind in ("profiles", "recipes"):
        assert {f"edgekd/_shipped/{kind}/{f.name}" for f in (ROOT / kind).glob("*.toml")} <= names
    information = wheel.name.rsplit("-", 3)[0] + ".dist-info"
    assert f"{information}/licenses/LICENSE" in names
    assert not [name for name in names if not name.startswith(("edgekd/", information))], "the wheel holds no tests"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of executables of a fresh environment with the wheel in it."""
    place = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(place)
    bin = place / ("Scripts" if os.name == "nt" else "bin")
    pip = ("-m", "pip", "--python", str(bin / "python"), "install", "--no-deps", "--no-index", "--quiet")
    ran(*pip, str(wheel))
    # The libraries that edgekd stands on, not installed again. Paths given so come last, and their own .pth files,
    # which an editable edgekd is found through, are not read.
    [packages] = (place / "lib").glob("python*/site-packages")
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    return bin


def test_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "profile.toml").write_text(PROFILE)
    where = ran("-c", "import edgekd; print(edgekd.__file__)", python=str(installed / "python"), cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    overrides = [text for key, value in QUICK.items() for text in ("--set", f"{key}={value}")]
    surroundings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [installed / "edgekd", "run", "demo", *overrides],
        cwd=tmp_path,
        env=surroundings,
        capture_output=True,
        text=True,
    )
    # The gate's verdict on a network that has seen one epoch does not matter here; 2, 3 and 70 are errors.
    assert done.returncode in (0, 1, 4), done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "runs" / "demo"
    results = json.loads((run / "results.json").read_text())
    [profile] = results["profiles"]
    assert [v["name"] for v in profile["variants"]] == ["teacher", "distill", "prune", "quantize"]
    assert "<svg" in (run / "report.html").read_text()
    assert len(list(run.glob("04-export-*/model.onnx"))) == 1
    assert "quantize" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.toml", "runs"]


def test_the_wheel_brings_its_profiles_and_recipes(installed: Path, tmp_path: Path) -> None:
    for kind in ("profiles", "recipes"):
        listed = ran("-m", "edgekd", "list", kind, "--json", python=str(installed / "python"), cwd=tmp_path)
        found = {item["name"] for item in json.loads(listed)["items"]}
        assert found == {f.stem for f in (ROOT / kind).glob("*.toml")}
