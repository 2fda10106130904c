"""What the runner makes by CUDA's runtime it destroys: with a library in its place that counts (cuda_stub.c)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgekd.bundle.runner import cuda
from edgekd.bundle.runner.engines import TensorRT
from edgekd.bundle.runner.errors import Failed

SOURCE = Path(__file__).with_name("cuda_stub.c")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `refused.so`, which finds the driver too old, and `taken.so`."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("stub")
    for name, code in (("taken", 0), ("refused", 35)):
        command = [compiler, "-shared", "-fPIC", f"-DREFUSED={code}", "-o", directory / f"{name}.so", SOURCE]
        subprocess.run(command, check=True)
    return directory


@pytest.fixture
def library(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cuda, "NAMES", ())
    monkeypatch.setattr(cuda, "PLACES", (str(compiled / "taken.so"),))
    return cuda._library()


@pytest.mark.usefixtures("library")
def test_a_runtime_that_the_driver_is_too_old_for_is_passed_over(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "NAMES", (str(compiled / "refused.so"),))
    assert cuda.described_gpu()["compute_capability"] == "9.0"
    assert cuda.described_gpu()["cuda_driver"] == "13.0"
    monkeypatch.setattr(cuda, "PLACES", ())
    with pytest.raises(Failed, match=r"cudaGetDeviceCount failed: driver version is insufficient \(35\)"):
        cuda.described_gpu()


class Context:
    """An execution context that takes everything, or refuses what `refuses` names."""

    def __init__(self, shape: tuple[int, ...], refuses: str) -> None:
        self.shape, self.refuses = shape, refuses

    def set_input_shape(self, name: str, shape: list[int]) -> bool:
        return self.refuses != "shape"

    def set_tensor_address(self, name: str, address: int) -> bool:
        return self.refuses != "address"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        return True


class Engine:
    num_io_tensors = 2

    def __init__(self, shape: tuple[int, ...] = (1, 4), kind: str = "FLOAT", refuses: str = "") -> None:
        self.shape, self.kind, self.refuses = shape, kind, refuses

    def create_execution_context(self) -> Context:
        return Context(self.shape, self.refuses)

    def get_tensor_name(self, i: int) -> str:
        return ("image", "logits")[i]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.kind)


@pytest.fixture
def session(library: Any, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """A network's session as it is before its first binding."""
    made = TensorRT.__new__(TensorRT)
    log = SimpleNamespace(last=lambda: "no reason given")
    monkeypatch.setattr("edgekd.bundle.runner.engines.logger_of", lambda trt: log)
    made.trt, made.facts, made.kept = None, {}, 3
    made.network = {"batch": 1, "inputs": [{"name": "image", "axes": ["batch", 4]}]}
    made.host, made.device_addresses, made.cuda = {}, {}, cuda.Cuda()
    made.fed = {"image": np.ones((1, 4), np.float32)}
    return made


def test_reopening_leaks_nothing_and_closing_leaves_nothing(session: TensorRT, library: Any) -> None:
    before = library.alive() - 1  # without the stream
    session.engine = Engine()
    session.bind()
    session.capture()
    bound = library.alive()
    assert bound - before == 1 + 4 + 2 + 4, "the stream, memory of two tensors twice, a graph twice, events"
    for _ in range(3):
        session.reopen()
        assert library.alive() == bound
    assert session.block()["compute_ns"] == [500_000] * 3
    session.close()
    assert library.alive() == before


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (Engine(refuses="shape"), r"the engine refuses \[1, 4\] as image: no reason given"),
        (Engine(refuses="address"), "the engine takes no memory for image: no reason given"),
        (Engine(kind="BF16"), "image of the engine is BF16, which NumPy has not"),
        (Engine(shape=(1, -1)), r"the shape of image depends on its values: \[1, -1\]"),
    ],
)
def test_what_an_engine_refuses_is_one_message(session: TensorRT, library: Any, engine: Engine, said: str) -> None:
    before = library.alive() - 1
    session.engine = engine
    with pytest.raises(Failed, match=said):
        session.bind()
    session.close()
    assert library.alive() == before
