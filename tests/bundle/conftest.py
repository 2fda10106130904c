from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import digits, linear, quick_profile

from edgekd.bundle import make_bundle
from edgekd.data import Dataset


@pytest.fixture(scope="session")
def data() -> Dataset:
    return digits()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> list[Path]:
    """A float and an int8 network of digits."""
    directory = tmp_path_factory.mktemp("files")
    return [linear(directory / "fp32.onnx", data), linear(directory / "int8.onnx", data, int8=True)]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, files: list[Path], data: Dataset) -> Path:
    """A bundle of both; tests copy it before they change it."""
    return make_bundle(files, tmp_path_factory.mktemp("made") / "digits", quick_profile(), data, images=200)


@pytest.fixture
def fresh(made: Path, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the bundle, as on a device."""
    return lambda: Path(shutil.copytree(made, tmp_path / "digits"))
