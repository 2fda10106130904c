"""PyTorch as a runtime, on the CPU; what needs a GPU is not run here."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd import models
from edgekd.artifact import ModelSpec, Preprocessing, TensorInfo
from edgekd.errors import EdgekdError, StageError, UsageError
from edgekd.onnx_file import export_onnx
from edgekd.runtimes import DeviceCall, open_session

SIZE = [1, 8, 8]


class Deployed(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        return {"logits": self.network(image)}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    spec = ModelSpec(use="cifar-resnet", args={"depth": 8, "width": 4, "num_classes": 10, "in_channels": 1})
    made = models.build(spec)
    with torch.no_grad():  # statistics of a network that was trained: not those of a fresh one
        made.train()(torch.randn(64, *SIZE))
    return made.eval()


@pytest.fixture(scope="module")
def program(network, tmp_path_factory):
    file = tmp_path_factory.mktemp("programs") / "network.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        Deployed(network).eval(), (torch.zeros(2, *SIZE),), dynamic_shapes={"image": {0: batch}}
    )
    torch.export.save(exported, file)
    return file


@pytest.fixture(scope="module")
def expected(network, tmp_path_factory):
    """Images, and ONNX Runtime's logits of them."""
    file = tmp_path_factory.mktemp("onnx") / "network.onnx"
    preprocessing = Preprocessing(size=SIZE, mean=[0.5], std=[0.5])
    export_onnx(network, file, size=SIZE, opset=18, classes=[str(i) for i in range(10)], preprocessing=preprocessing)
    images = np.random.default_rng(0).standard_normal((16, *SIZE)).astype(np.float32)
    return images, open_session(file).run({"image": images})["logits"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 4e-3), ("bf16", 3e-2)])
def test_a_program_computes_what_onnx_runtime_computes(program, expected, precision, tolerance):
    images, logits = expected
    session = open_session(program, runtime="torch", options={"precision": precision})
    found = session.run({"image": images})["logits"]
    assert found.dtype == np.float32
    difference = np.abs(found - logits).max() / np.abs(logits).max()
    assert difference < tolerance
    if precision != "fp32":
        assert difference > 1e-5  # it did compute in half precision


def test_it_says_what_it_takes_and_gives(program):
    session = open_session(program, runtime="torch")
    assert session.inputs == [TensorInfo(name="image", dtype="float32", axes=["batch", *SIZE])]
    assert session.outputs == [TensorInfo(name="logits", dtype="float32", axes=["batch", 10])]


def test_a_bound_call_runs_and_is_no_device_call_on_the_cpu(program, expected):
    session = open_session(program, runtime="torch", options={"precision": "bf16"})
    call = session.bound({"image": expected[0][:1]})
    call()
    assert not isinstance(call, DeviceCall)


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ({"picture": np.zeros((1, *SIZE), np.float32)}, "no input 'picture'"),
        ({"image": np.zeros((1, *SIZE), np.float64)}, "must be float32"),
        ({"image": np.zeros((1, 1, 9, 8), np.float32)}, "got shape"),
    ],
)
def test_a_feed_that_does_not_fit_is_refused(program, feed, words):
    session = open_session(program, runtime="torch")
    with pytest.raises(UsageError, match=words):
        session.run(feed)
    with pytest.raises(UsageError, match=words):
        session.bound(feed)


def test_a_batch_that_the_program_was_not_exported_for_is_told(program):
    session = open_session(program, runtime="torch")
    with pytest.raises(UsageError, match="not exported for this input"):
        session.run({"image": np.zeros((65, *SIZE), np.float32)})


def test_a_closed_session_says_so(program, expected):
    session = open_session(program, runtime="torch")
    session.close()
    with pytest.raises(StageError, match="closed"):
        session.run({"image": expected[0]})


def test_another_file_is_no_program(tmp_path):
    (tmp_path / "no.pt2").write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="not an exported program"):
        open_session(tmp_path / "no.pt2", runtime="torch")
    with pytest.raises(UsageError, match="cannot be read"):
        open_session(tmp_path / "missing.pt2", runtime="torch")


class Planted:
    """Writes a file when it is unpickled, as any pickle may."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "unpickled")


def rewritten(program, copy, change):
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return copy


def test_a_program_whose_example_is_a_pickle_is_not_loaded(program, tmp_path):
    planted = tmp_path / "planted"
    buffer = io.BytesIO()
    torch.save(((Planted(planted),), {}), buffer)
    copy = rewritten(
        program,
        tmp_path / "copy.pt2",
        lambda name, data: buffer.getvalue() if "sample_inputs" in name else data,
    )
    with pytest.raises(UsageError, match="not an exported program"):
        open_session(copy, runtime="torch")
    assert not planted.exists()


def test_a_program_whose_weights_are_pickles_is_not_loaded(program, tmp_path):
    copy = rewritten(
        program, tmp_path / "copy.pt2", lambda _, data: data.replace(b'"use_pickle": false', b'"use_pickle": true')
    )
    with pytest.raises(UsageError, match="pickled objects"):
        open_session(copy, runtime="torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_with_what_is_missing(program):
    with pytest.raises(EdgekdError, match=r"needs (torch's CUDA build|an NVIDIA GPU)") as error:
        open_session(program, runtime="torch", options={"device": "cuda"})
    assert error.value.exit_code == 3
