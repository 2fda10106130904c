"""What is in a bundle: files that fit each other, real inputs, reference outputs; the same bytes again."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import zstandard
from tiny_bundle import linear, normalised, quick_profile

from edgekd.bundle import BundleFile, make_bundle, runner_source
from edgekd.bundle.runner import MODULES
from edgekd.bundle.single_file import DIRECTORY
from edgekd.data import Dataset
from edgekd.errors import StageError, UsageError


def manifest(bundle: Path) -> dict:
    return json.loads((bundle / "bundle.json").read_text())


def test_every_file_is_there_with_its_hash(made: Path) -> None:
    told = manifest(made)
    names = {"README.txt", "expected.npz", "fp32.onnx", "inputs.npz", "int8.onnx", "run.py"}
    assert set(told["files"]) == names
    assert {p.name for p in made.iterdir()} == {*names, "bundle.json"}
    for name, (sha256, size) in told["files"].items():
        content = (made / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (sha256, size)
    assert [n["precision"] for n in told["networks"]] == ["fp32", "int8"]
    assert told["profile"]["name"] == "cpu-x86"
    assert (made / "run.py").stat().st_mode & 0o111


def test_inputs_are_test_images_of_all_classes_and_outputs_are_what_onnx_runtime_gives(
    made: Path, data: Dataset
) -> None:
    inputs, expected = np.load(made / "inputs.npz"), np.load(made / "expected.npz")
    assert inputs["images"].shape == (200, *data.size)
    assert set(inputs["labels"]) == set(range(10))
    pool = {image.tobytes() for image in data.test.images.numpy()}
    assert all(image.tobytes() in pool for image in inputs["images"])
    fed = normalised(inputs["images"], data)
    for name in ("fp32", "int8"):
        session = onnxruntime.InferenceSession(made / f"{name}.onnx")
        np.testing.assert_allclose(expected[f"{name}.logits"], session.run(None, {"image": fed})[0], atol=1e-5)
    accuracy = (expected["fp32.logits"].argmax(1) == inputs["labels"]).mean()
    assert accuracy > 0.85, "a network that knows digits: a wrong order of labels would be seen"


def test_the_same_bundle_is_the_same_bytes(files: list[Path], data: Dataset, tmp_path: Path) -> None:
    one, other = (make_bundle(files, tmp_path / d / "b", quick_profile(), data, images=50) for d in "xy")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("ending", [".tar.zst", ".tar.gz"])
def test_an_archive_holds_the_directory(ending: str, files: list[Path], data: Dataset, tmp_path: Path) -> None:
    plain = make_bundle(files, tmp_path / "digits", quick_profile(), data, images=50)
    archive = make_bundle(files, tmp_path / f"digits{ending}", quick_profile(), data, images=50)
    content = archive.read_bytes()
    raw = zstandard.decompress(content) if ending == ".tar.zst" else gzip.decompress(content)
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        assert sorted(tar.getnames()) == sorted(f"digits/{p.name}" for p in plain.iterdir())
        for path in plain.iterdir():
            member = tar.extractfile(f"digits/{path.name}")
            assert member is not None
            assert member.read() == path.read_bytes()
        assert tar.getmember("digits/run.py").mode == 0o755
    assert [p.name for p in tmp_path.glob(".*")] == [], "nothing temporary is left"


def test_somebody_elses_network_gets_random_inputs(tmp_path: Path, data: Dataset) -> None:
    static = linear(tmp_path / "static.onnx", data, batch=2)
    bundle = make_bundle([static], tmp_path / "bundle", quick_profile(), None)
    told, inputs = manifest(bundle), np.load(bundle / "inputs.npz")
    assert (told["rows"], told["networks"][0]["batch"], told["data"], told["classes"]) == (32, 2, "", [])
    assert {name: inputs[name].shape for name in inputs.files} == {"input0": (32, *data.size)}


def test_an_old_bundle_is_replaced_and_nothing_else_is(made: Path, files: list[Path], tmp_path: Path) -> None:
    bundle = make_bundle(files[:1], tmp_path / "bundle", quick_profile(), None)
    make_bundle(files, bundle, quick_profile(), None)
    assert len(manifest(bundle)["networks"]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="exists and is no bundle"):
        make_bundle(files, tmp_path / "mine", quick_profile(), None)
    with pytest.raises(UsageError, match=r"endings: \.tar\.zst, \.tar\.gz"):
        make_bundle(files, tmp_path / "bundle.zip", quick_profile(), None)


def test_no_bundle_is_made_for_a_dla(files: list[Path], tmp_path: Path) -> None:
    profile = quick_profile("jetson-agx-orin-64gb")
    assert profile.tensorrt is not None
    dla = profile.model_copy(update={"tensorrt": profile.tensorrt.model_copy(update={"dla": 0})})
    with pytest.raises(UsageError, match=r"asks for DLA 0, run\.py builds for the GPU"):
        make_bundle(files, tmp_path / "dla", dla, None)
    assert not list(tmp_path.iterdir())
    make_bundle(files, tmp_path / "gpu", profile, None)


def test_what_cannot_be_bundled_is_told_and_leaves_nothing(files: list[Path], data: Dataset, tmp_path: Path) -> None:
    twice = [BundleFile("a", files[0]), BundleFile("a", files[1])]
    with pytest.raises(UsageError, match="different names"):
        make_bundle(twice, tmp_path / "b", quick_profile(), data)
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(UsageError, match="not an ONNX file"):
        make_bundle([tmp_path / "text.onnx"], tmp_path / "b", quick_profile(), data)
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="cannot write"):
        make_bundle(files, tmp_path / "file" / "b", quick_profile(), data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "text.onnx"]


def test_run_py_is_one_file_of_python_3_8_without_edgekd() -> None:
    source = runner_source()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level] == []
    beside = {"numpy", "onnxruntime", "tensorrt"}
    assert beside <= imported
    assert not imported - beside - {
        "__future__", "argparse", "ctypes", "datetime", "fcntl", "gc", "glob", "hashlib", "json", "math", "os",
        "platform", "re", "shutil", "signal", "subprocess", "sys", "threading", "time", "traceback", "typing",
        "zipfile",
    }  # fmt: skip
    # Of its runtimes it needs one only: each is imported where it is used.
    assert not {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names} & {"onnxruntime", "tensorrt"}


def test_no_two_modules_of_the_runner_define_one_name() -> None:
    seen: dict[str, str] = {}
    for module in MODULES:
        tree = ast.parse((DIRECTORY / f"{module}.py").read_text())
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        targets = [n.targets if isinstance(n, ast.Assign) else [n.target] for n in tree.body
                   if isinstance(n, ast.Assign | ast.AnnAssign)]  # fmt: skip
        flat = [e.id for ts in targets for t in ts for e in ast.walk(t) if isinstance(e, ast.Name)]
        for name in {*names, *flat} - {"__all__"}:
            assert name not in seen, f"{name} is in {seen[name]} and in {module}"
            seen[name] = module
    assert sorted(p.stem for p in DIRECTORY.glob("*.py")) == sorted([*MODULES, "__init__"])
