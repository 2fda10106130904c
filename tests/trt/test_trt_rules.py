"""Rules that hold without a compiler: every wrong file is found, every right one and all of edgekd's are left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from wrong_files import RIGHT_FILES, WRONG_FILES, F, Net, WrongFile

from edgekd.artifact import ModelSpec, Preprocessing
from edgekd.errors import UsageError
from edgekd.models import build
from edgekd.onnx_file import export_onnx
from edgekd.quant import SCHEMES, calibrate, convert, prepare
from edgekd.trt.rules import RULES, Finding, check, summarised

PAGE = (Path(__file__).parents[2] / "docs" / "tensorrt.md").read_text(encoding="utf-8")


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(f.rule, f.node) for f in findings if f.severity != "note"]


@pytest.mark.parametrize("file", WRONG_FILES, ids=lambda file: file.name)
def test_a_wrong_file_is_found_by_its_rule_alone(file: WrongFile) -> None:
    findings = check(file.build(), file.version)
    severity = "float" if file.does == "float" else "refused"
    assert {f.rule for f in findings if f.severity in ("refused", severity)} == {file.rule}
    if file.does == "float":
        assert (file.rule, file.layer) in bad(findings)
    if file.does == "builds":
        assert bad(check(file.build(), "11")) == []


def test_there_is_a_wrong_file_for_every_rule_that_is_more_than_a_note() -> None:
    assert {file.rule for file in WRONG_FILES} == {name for name, rule in RULES.items() if rule.severity != "note"}


@pytest.mark.parametrize("name", RIGHT_FILES)
def test_a_right_file_is_left_alone(name: str) -> None:
    assert bad(check(RIGHT_FILES[name]())) == []


def test_the_newest_tensorrt_is_meant_where_none_is_named() -> None:
    model = RIGHT_FILES["plain"]()
    model.opset_import[0].version = 25
    assert check(model) == check(model, "11") == []
    assert bad(check(model, "10.15")) == [("opset", "")]
    with pytest.raises(UsageError, match=r"expected a TensorRT version such as 10.3, got 'ten'"):
        check(model, "ten")


NETWORKS: dict[str, dict[str, Any]] = {
    "cifar-resnet": {"depth": 8, "width": 4},
    "cifar-resnet with convolutions": {"depth": 8, "width": 4, "shortcut": "conv"},
    "mobilenet": {"width": 0.25},
    "vit": {"patch": 4, "dim": 16, "depth": 1, "heads": 2, "image_size": 16},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ModelProto]:
    """A small network of a family, quantized by a scheme and written by edgekd."""
    directory = tmp_path_factory.mktemp("exported")

    def made(name: str, scheme: str) -> ModelProto:
        torch.manual_seed(0)
        images = torch.randn(8, 3, 16, 16)
        network = prepare(
            build(ModelSpec(use=name.split()[0], args=NETWORKS[name])).eval(), images, SCHEMES[scheme], qat=False
        )
        calibrate(network, [images])
        path = directory / "model.onnx"
        preprocessing = Preprocessing(size=[3, 16, 16], mean=[0.5] * 3, std=[0.5] * 3)
        export_onnx(
            convert(network),
            path,
            size=[3, 16, 16],
            opset=18,
            classes=[str(n) for n in range(10)],
            preprocessing=preprocessing,
        )
        return onnx.load(path)

    return made


@pytest.mark.parametrize("name", NETWORKS)
def test_what_edgekd_writes_for_tensorrt_is_left_alone(name: str, exported: Callable[[str, str], ModelProto]) -> None:
    findings = check(exported(name, "trt-s8s8"))
    assert bad(findings) == []
    # The two products of attention are of activations: no scheme quantizes them.
    assert len(findings) == (2 if name == "vit" else 0)
    assert all("two activations" in f.what for f in findings)


def test_what_edgekd_writes_for_a_cpu_is_refused_with_the_modules_that_it_holds_for(
    exported: Callable[[str, str], ModelProto],
) -> None:
    findings = check(exported("cifar-resnet", "x86-u8s8"), "10.3")
    assert {f.rule for f in findings if f.severity == "refused"} >= {"zero-point", "int32-bias"}
    assert "layer2.0.conv2" in {f.path for f in findings}
    assert all("trt-s8s8" in f.hint for f in findings if f.rule == "zero-point")


class Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.batches = iter([{"x": np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(F)}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two convolutions around a residual addition, and a classifier."""
    net = Net()

    def conv(x: str, name: str) -> str:
        weight = net.constant(net.random.normal(size=(8, 8, 3, 3)).astype(F), f"{name}.weight")
        bias = net.constant(np.ones(8, F), f"{name}.bias")
        return net.add("Conv", x, weight, bias, name=f"node_{name}", pads=[1] * 4)

    x = net.add("Relu", conv(net.input(shape=("batch", 8, 8, 8)), "stem"))
    x = net.add("Relu", net.add("Add", conv(x, "block.conv"), x, name="residual"))
    x = net.add("Flatten", net.add("GlobalAveragePool", net.add("MaxPool", x, kernel_shape=[2, 2])))
    bias = net.constant(np.ones(4, F), "head.bias")
    x = net.add("Gemm", x, net.constant(net.random.normal(size=(8, 4)).astype(F), "head.weight"), bias, name="head")
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    onnx.save(net.model(x), path)
    return path


S8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
NO_BIAS = {"ActivationSymmetric": True, "QuantizeBias": False}


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, {"zero-point", "int32-bias"}),
        ({"activation_type": QuantType.QUInt8, "quant_format": QuantFormat.QOperator}, {"zero-point", "operator"}),
        ({**S8}, {"zero-point", "int32-bias"}),
        ({**S8, "extra_options": {"ActivationSymmetric": True}}, {"int32-bias"}),
        ({**S8, "extra_options": NO_BIAS}, set()),
        ({**S8, "per_channel": True, "extra_options": NO_BIAS}, set()),
        ({**S8, "extra_options": {**NO_BIAS, "AddQDQPairToWeight": True, "DedicatedQDQPair": True}}, set()),
        # The addition reads what was quantized for the convolution.
        ({**S8, "op_types_to_quantize": ["Conv", "Gemm"], "extra_options": NO_BIAS}, set()),
    ],
    ids=["default", "operators", "int8", "symmetric", "right", "per channel", "pairs", "without Add"],
)
def test_files_of_onnx_runtime_are_judged_by_the_settings_that_made_them(
    options: dict[str, Any], rules: set[str], float_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "quantized.onnx"
    quantize_static(float_file, path, Images(), **{"quant_format": QuantFormat.QDQ, **options})
    findings = check(onnx.load(path), "10.3")
    assert {rule for rule, _ in bad(findings)} == rules
    for finding in findings:
        if finding.rule in ("int32-bias", "zero-point"):
            # The hint names the setting that mends it.
            assert re.search("QuantizeBias|ActivationSymmetric", finding.hint)
    if "int32-bias" in rules:
        assert {f.path for f in findings if f.rule == "int32-bias"} == {"stem", "block.conv", "head"}


def test_notes_are_no_findings_of_something_wrong() -> None:
    net = Net()
    x = net.input(shape=("batch", 8, "height", "width"))
    y = net.add("Add", net.pair(net.conv(x)), net.constant(np.ones((1, 16, 1, 1), F)))
    found = check(net.model(net.add("Conv", y, net.float_weight(4, 16, 1, 1), name="float")), "8.6")
    assert [(f.rule, f.node) for f in found] == [
        ("open-axes", "x"),
        ("bias-behind-pair", "conv"),
        ("not-quantized", "float"),
    ]
    assert "axes 2, 3" in found[0].what

    net = Net()
    weight = [
        onnx.helper.make_tensor("w", TensorProto.INT4, [8, 16], [0] * 128),
        onnx.helper.make_tensor("z", TensorProto.INT4, [16], [0] * 16),
    ]
    net.constants += weight
    weight_name = net.add("DequantizeLinear", "w", net.constant(np.ones(16, F)), "z", axis=1)
    product = net.add("MatMul", net.input(shape=(4, 8), dtype=TensorProto.DOUBLE), weight_name, name="fc")
    ends = [net.constant(np.array([2**40, 2**63 - 1])), net.constant(np.array([0, 1]))]
    net.add("Slice", product, net.constant(np.array([0, 0])), ends[0], ends[1], name="slice")
    net.add("NonZero", product, name="where")
    found = check(net.model("slice_out", opset=17), "8.6")
    assert {f.rule for f in found if f.severity == "note"} == {"weight-only", "double", "int64-range", "plugin"}
    assert next(f.what for f in found if f.rule == "int64-range") == "constant constant3 holds 1099511627776"


def test_the_same_of_many_layers_becomes_one_line() -> None:
    net = Net()
    x = net.input()
    for number in range(5):
        weight = net.weight(8, 8, 3, 3, name=f"layer{number}.weight")
        x = net.add("Conv", net.pair(x, zero=np.int8(3)), weight, name=f"c{number}", pads=[1] * 4)
    x = net.add("Conv", x, net.weight(8, 8, 3, 3), name="last")
    findings = check(net.model(x))
    assert [(f.rule, f.path) for f in findings if f.rule == "zero-point"] == [
        ("zero-point", f"layer{n}") for n in range(5)
    ]
    zero, side = summarised(findings)
    assert (zero.rule, side.rule) == ("zero-point", "one-side")
    assert zero.what == "its zero point is 3, not 0; the same in 5 layers: layer0, layer1, layer2 and 2 more"
    assert side == findings[-1]
    assert summarised([]) == []


def test_rules_see_into_loops() -> None:
    net = Net()
    inner = Net()
    inner.nodes.append(onnx.helper.make_node("Identity", ["on"], ["on_out"]))
    y = inner.add("Conv", inner.pair("value", zero=np.int8(7)), inner.weight(8, 8, 3, 3), name="inner", pads=[1] * 4)
    value = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 8, 8, 8)) for n in ("value", y)]
    on = [onnx.helper.make_tensor_value_info(n, TensorProto.BOOL, ()) for n in ("on", "on_out")]
    count = onnx.helper.make_tensor_value_info("i", TensorProto.INT64, ())
    body = onnx.helper.make_graph(inner.nodes, "body", [count, on[0], value[0]], [on[1], value[1]], inner.constants)
    x = net.add("Loop", net.constant(np.int64(3)), net.constant(np.bool_(True)), net.input(), body=body)
    assert [f.rule for f in check(net.model(x))] == ["zero-point"]


def test_the_page_has_every_rule_with_what_it_does() -> None:
    table = PAGE.partition("| rule | what | does | seen with |\n")[2].partition("\n\n")[0]
    cells = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in table.splitlines()[1:]]
    rows = {name: does for name, _, does, _ in cells}
    assert rows == {name: rule.severity for name, rule in RULES.items()}
