"""Files judged by rules and by the compiler: what is int8 and what is not, and what cannot be told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from quantized_layers import write_layer

from edgekd import quant
from edgekd.artifact import ModelSpec, Preprocessing
from edgekd.errors import UsageError
from edgekd.models import Tapped, build
from edgekd.onnx_file import export_onnx
from edgekd.profile import load_profile
from edgekd.report.verification import verification_text
from edgekd.trt import Verification, compiler, verify
from edgekd.trt.layers import engine_layers
from edgekd.trt.matrix import MatrixNode
from edgekd.trt.placing import placed

needs_compiler = pytest.mark.skipif(not compiler.compiler_installed(), reason="the extra trt-verify is not installed")
NANO = load_profile("jetson-orin-nano-8gb")
LOGS = Path(__file__).with_name("logs")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build(
        ModelSpec(use="cifar-resnet", args={"depth": 8, "width": 4, "num_classes": 10, "in_channels": 1})
    ).eval()


@pytest.fixture(scope="module")
def quantized(network, tmp_path_factory):
    """A ResNet as the scheme trt-s8s8 leaves it, in opset 17."""
    images = torch.randn(16, 1, 8, 8)
    prepared = quant.prepare(Tapped(network), images, quant.scheme_named("trt-s8s8", "test"), qat=False)
    quant.calibrate(prepared, [images])
    quant.enable_fake_quant(prepared)
    file = tmp_path_factory.mktemp("files") / "model.int8.onnx"
    plain = Preprocessing(size=[1, 8, 8], mean=[0.5], std=[0.25])
    classes = [str(i) for i in range(10)]
    export_onnx(quant.convert(prepared), file, size=[1, 8, 8], opset=17, classes=classes, preprocessing=plain)
    return file


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "BINDINGS", "tensorrt_rtx_bindings_that_nobody_has")


@needs_compiler
def test_every_matrix_layer_of_a_quantized_network_is_int8_and_has_its_modules_path(network, quantized):
    found = verify(quantized, NANO)
    modules = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert [layer.path for layer in found.layers] == modules
    assert {(layer.wanted, layer.got) for layer in found.layers} == {("int8", "int8")}
    assert found.wanted == found.got == {"int8": len(modules)}
    assert found.ok
    assert found.findings == []
    assert (found.origin, found.compiled) == ("compiled", True)
    assert (found.compute_capability, found.compiled_for) == ("8.7", "8.6")
    assert found.notes == ["compiled for 8.6, the nearest that the compiler has; the device is 8.7"]
    assert Verification.model_validate_json(found.model_dump_json()) == found


@needs_compiler
@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("Conv", {"input_scale": [0.01, 0.02, 0.03, 0.04]}),
        ("ConvTranspose", {}),
        ("ConvTranspose", {"dtype": np.float16}),
    ],
)
def test_a_layer_that_is_silently_not_int8_fails_the_file(tmp_path, op, changes):
    found = verify(write_layer(tmp_path / "model.onnx", op, **changes), NANO)
    (layer,) = found.layers
    assert found.compiled
    assert layer.wanted == "int8"
    assert layer.got == ("fp16" if "dtype" in changes else "fp32")
    assert found.silently_float == [layer]
    assert [finding.severity for finding in found.findings] == ["float"]
    assert not found.ok


@needs_compiler
def test_a_relu_is_fused_into_a_typed_fp16_layer(tmp_path):
    found = verify(write_layer(tmp_path / "model.onnx", quantized="none", dtype=np.float16), NANO)
    (layer,) = found.layers
    assert (layer.wanted, layer.got, layer.output) == ("fp16", "fp16", "fp16")
    assert [(f.op, f.node) for f in layer.fused] == [("Relu", "relu")]
    assert found.ok


@needs_compiler
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_matrix_products_between_quantized_tensors_are_int8(tmp_path, op, dtype):
    found = verify(write_layer(tmp_path / "model.onnx", op, dtype=dtype), NANO)
    assert [(layer.wanted, layer.got) for layer in found.layers] == [("int8", "int8")]
    assert found.ok


@needs_compiler
def test_a_refused_file_says_which_node_and_why(tmp_path):
    found = verify(write_layer(tmp_path / "model.onnx", weight_dtype=np.uint8), NANO)
    assert not found.ok
    assert found.compiled is False
    assert found.why == "the parser refuses 1 node"
    assert [refusal.node for refusal in found.refused] == ["w.dq"]
    assert "refused" in [finding.severity for finding in found.findings]
    assert found.got == {}


@needs_compiler
def test_layers_without_names_or_with_the_same_are_told_apart(quantized, tmp_path):
    model = onnx.load(quantized)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    for index, node in enumerate(convolutions):
        node.name = "" if index % 2 else "same"
    onnx.save(model, tmp_path / "model.onnx")
    found = verify(tmp_path / "model.onnx", NANO)
    assert found.got == {"int8": len(convolutions) + 1}
    assert len({layer.engine_layer for layer in found.layers}) == len(found.layers)
    assert found.layers[1].node == f"node_of_{convolutions[1].output[0]}"


@needs_compiler
def test_turing_falls_back_where_the_compiler_has_no_float_products(tmp_path):
    file = write_layer(tmp_path / "model.onnx", "Gemm", quantized="none")
    found = verify(file, load_profile("gpu-t4"))
    assert (found.compute_capability, found.compiled_for, found.ok) == ("7.5", "8.0", True)
    assert "fp32 matrices for 7.5" in " ".join(found.notes)
    assert verify(file, load_profile("gpu-t4"), compute_capability="8.9").compiled_for == "8.9"


def test_without_the_compiler_the_rules_judge(quantized, tmp_path, without_compiler):
    found = verify(quantized, NANO)
    assert (found.origin, found.compiled, found.got, found.ok) == ("static", None, {}, True)
    assert found.wanted == {"int8": 8}
    assert "pip install 'edgekd[trt-verify]'" in found.notes[0]
    wrong = verify(write_layer(tmp_path / "model.onnx", quantized="weight"), NANO)
    assert (wrong.origin, wrong.ok) == ("static", False)
    assert wrong.wanted == {"fp32": 1}


def test_a_compiler_that_crashes_is_no_traceback(quantized, tmp_path, monkeypatch):
    (tmp_path / "tensorrt_rtx_bindings.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = verify(quantized, NANO)
    assert (found.origin, found.compiler, found.compiled, found.why) == ("static", None, None, None)
    assert "judged by rules alone, the compiler was ended by SIGABRT" in found.notes[0]
    assert verification_text(found).splitlines()[0].endswith("judged by rules alone")
    wrong = verify(write_layer(tmp_path / "model.onnx", quantized="weight"), NANO)
    assert (wrong.origin, wrong.ok) == ("static", False), "what the rules find counts all the same"


def test_profiles_without_tensorrt_and_odd_capabilities_are_usage_errors(quantized):
    with pytest.raises(UsageError, match=r"cpu-x86 runs onnxruntime, not TensorRT"):
        verify(quantized, load_profile("cpu-x86"))
    with pytest.raises(UsageError, match=r"expected a compute capability such as 8\.6, got 'sm_86'"):
        verify(quantized, NANO, compute_capability="sm_86")


@pytest.mark.parametrize(
    ("log", "node", "kind", "precision", "fused"),
    [
        ("resnet8-int8", "conv1", "correlation", "int8", []),
        ("resnet8-int8", "linear", "gemm", "int8", []),
        ("resnet8-fp16", "node_Conv_187", "correlation", "fp16", ["node_relu_2", "node_add_60"]),
        ("vit-fp16", "node_MatMul_56", "kgen", "fp16", ["node_scaled_dot_product_attention", "node_Softmax_57"]),
        ("vit-fp16", "node_MatMul_7", "runtime_fusion", "fp16", ["node_linear"]),
        ("transposed-int8", "the.layer", "deconv", "fp16", ["relu"]),
        ("weight-only", "the.layer", "runtime_fusion", "fp16", ["relu"]),
    ],
)
def test_of_the_layers_that_share_a_node_the_one_that_multiplies_is_taken(log, node, kind, precision, fused):
    ops = {"node_relu_2": "Relu", "node_add_60": "Add", "relu": "Relu", "node_linear": "Add", "wd": "DequantizeLinear"}
    ops |= {"node_Softmax_57": "Softmax", "node_scaled_dot_product_attention": "MatMul", node: "MatMul"}
    engine = engine_layers((LOGS / f"{log}.txt").read_text())
    (row,) = placed([MatrixNode(node, None, "MatMul", "int8")], engine, ops)
    assert (row.engine_type, row.got) == (kind, precision)
    assert [f.node for f in row.fused] == fused
