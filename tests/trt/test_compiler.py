"""The compiler in its own process: what it takes and refuses, and what becomes of one that is broken or missing."""

from __future__ import annotations

import pytest
from quantized_layers import write_layer

from edgekd.errors import MissingExtra, StageError, UsageError
from edgekd.trt import TARGETS, compile_onnx, compiler, nearest_target
from edgekd.trt.layers import engine_layers

needs_compiler = pytest.mark.skipif(not compiler.compiler_installed(), reason="the extra trt-verify is not installed")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_layer(tmp_path_factory.mktemp("files") / "größe ☺.onnx", shape=("batch", 4, 8, 8))


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Puts a module of one's own where the bindings are looked for."""

    def put(body):
        (tmp_path / "tensorrt_rtx_bindings.py").write_text(body)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


@needs_compiler
def test_a_file_becomes_an_engine_for_the_wanted_batches(file):
    compiled = compile_onnx(file, "8.6", batches=(2, 3, 5))
    assert compiled.ok
    assert compiled.engine_bytes > 1000
    assert compiled.refused == compiled.errors == []
    assert compiled.compute_capability == "8.6"
    assert compiled.version.count(".") == 3
    assert "MinShape: [2,4,8,8], OptShape: [3,4,8,8], MaxShape: [5,4,8,8]" in compiled.log
    assert "the.layer" in [node for layer in engine_layers(compiled.log) for node in layer.nodes]


@needs_compiler
def test_the_compute_capability_reaches_the_builder(tmp_path):
    """Turing is the one for which TensorRT-RTX multiplies no fp32 matrices."""
    file = write_layer(tmp_path / "gemm.onnx", "Gemm", quantized="none")
    assert compile_onnx(file, "8.6").ok
    turing = compile_onnx(file, "7.5")
    assert not turing.ok
    assert turing.refused == []
    assert "the.layer" in turing.errors[-1]
    assert "SM75" in turing.errors[-1]


@needs_compiler
def test_a_refused_node_is_named_with_the_reason(tmp_path):
    compiled = compile_onnx(write_layer(tmp_path / "uint8.onnx", weight_dtype="uint8"), "8.6")
    assert not compiled.ok
    (refusal,) = compiled.refused
    assert (refusal.node, refusal.op, refusal.code) == ("w.dq", "DequantizeLinear", "UNSUPPORTED_NODE")
    assert "UINT8" in refusal.what


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_what_is_no_onnx_file_is_a_usage_error(tmp_path, file, content):
    other = tmp_path / "other.onnx"
    other.write_bytes(file.read_bytes()[:500] if content is None else content)
    with pytest.raises(UsageError, match="not an ONNX file, or one that is cut off") as caught:
        compile_onnx(other, "8.6")
    assert str(other) in str(caught.value)


@needs_compiler
def test_another_open_axis_than_the_batch_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"input 'x' leaves axes 2, 3 open"):
        compile_onnx(write_layer(tmp_path / "open.onnx", shape=("n", 4, "h", "w")), "8.6")


@needs_compiler
def test_a_compiler_that_does_not_end_is_stopped(file):
    with pytest.raises(StageError, match=r"did not end within 0.01 s"):
        compile_onnx(file, "8.6", timeout_s=0.01)


@needs_compiler
def test_nothing_is_written_beside_the_file_or_into_a_temporary_directory(file, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "no such directory"))
    assert compile_onnx(file, "8.6").ok
    assert list(file.parent.iterdir()) == [file]


def test_only_the_targets_of_the_compiler_are_taken(file):
    with pytest.raises(UsageError, match=r"compute capability 8\.7") as caught:
        compile_onnx(file, "8.7")
    assert ", ".join(TARGETS) in str(caught.value)


@pytest.mark.parametrize(
    ("device", "target"), [("8.7", "8.6"), ("9.0", "8.9"), ("11.0", "12.0"), ("7.2", "7.5"), ("12.1", "12.1")]
)
def test_the_nearest_target_stands_for_a_device_that_is_none(device, target):
    assert nearest_target(device) == target


def test_without_the_extra_it_is_said_how_to_get_it(file, monkeypatch):
    monkeypatch.setattr(compiler, "BINDINGS", "tensorrt_rtx_bindings_that_nobody_has")
    with pytest.raises(MissingExtra, match=r"edgekd\[trt-verify\]"):
        compile_onnx(file, "8.6")


def test_bindings_that_do_not_load_are_a_missing_extra(file, broken):
    broken("raise OSError('libtensorrt_rtx.so.1: cannot open shared object file')")
    with pytest.raises(MissingExtra, match=r"does not load: libtensorrt_rtx.so.1"):
        compile_onnx(file, "8.6")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import os; print('{noise}'); os.abort()", "was ended by SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "perhaps for want of memory"),
        ("raise SystemExit('no licence')", "ended with status 1; the last it said: no licence"),
    ],
)
def test_a_compiler_that_crashes_is_one_message(file, broken, body, told):
    broken(body)
    with pytest.raises(StageError, match=told) as caught:
        compile_onnx(file, "8.6")
    assert file.name in str(caught.value)
    assert caught.value.exit_code == 3
