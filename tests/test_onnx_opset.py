"""Files of opset 18 in the operators of 17 and of 19: valid, and the same numbers in ONNX Runtime, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from edgekd.artifact import Preprocessing
from edgekd.errors import StageError, UsageError
from edgekd.models.cifar_resnet import cifar_resnet
from edgekd.models.mobilenet import mobilenet
from edgekd.models.vit import vit
from edgekd.onnx_edit import opset_of
from edgekd.onnx_file import export_onnx
from edgekd.onnx_opset import downgraded, upgraded
from edgekd.quant import SCHEMES, calibrate, convert, prepare

PREPROCESSING = Preprocessing(size=[1, 16, 16], mean=[0.3], std=[0.35], colour="grey")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: cifar_resnet(8, 4, shortcut="pad", num_classes=10, in_channels=1),
    "mobilenet": lambda: mobilenet(width=0.25, num_classes=10, in_channels=1),
    "vit": lambda: vit(patch=4, dim=8, depth=1, heads=2, num_classes=10, in_channels=1, image_size=16),
}


def digits() -> torch.Tensor:
    """[64, 1, 16, 16], normalised."""
    images = torch.from_numpy(load_digits().images[:64]).float().unsqueeze(1) / 16
    return (F.interpolate(images, size=16, mode="bilinear") - 0.3) / 0.35


@pytest.fixture(scope="module")
def network() -> Callable[..., nn.Module]:
    """A network in evaluation mode, quantized if a scheme is given."""

    @cache
    def make(name: str, scheme: str | None) -> nn.Module:
        torch.manual_seed(0)
        made = NETWORKS[name]().train()
        with torch.no_grad():
            made(digits())  # batch norms of their own, rather than 0 and 1
        made.eval()
        if scheme is None:
            return made
        prepared = prepare(made, digits()[:8], SCHEMES[scheme], qat=True)
        calibrate(prepared, digits().split(32))
        return convert(prepared.eval())

    return make


def written(module: nn.Module, path: Path, opset: int) -> onnx.ModelProto:
    classes = [str(d) for d in range(10)]
    export_onnx(module, path, size=[1, 16, 16], opset=opset, classes=classes, preprocessing=PREPROCESSING)
    return onnx.load(path)


@pytest.fixture(scope="module")
def newer(
    network: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., onnx.ModelProto]:
    """The file of opset 18 that is made of a network."""
    file = tmp_path_factory.mktemp("newer") / "model.onnx"
    return cache(lambda name, scheme: written(network(name, scheme), file, 18))


def outputs(model: onnx.ModelProto, **feed: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def same(model: onnx.ModelProto, other: onnx.ModelProto, **feed: np.ndarray[Any, Any]) -> None:
    for expected, found in zip(outputs(model, **feed), outputs(other, **feed), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("resnet", None),
        ("resnet", "x86-u8s8"),
        ("resnet", "trt-s8s8"),
        ("mobilenet", None),
        ("vit", None),
        ("vit", "trt-s8s8"),
    ],
)
def test_a_network_computes_the_same_in_opset_17_18_and_19(
    newer: Callable[..., onnx.ModelProto], name: str, scheme: str | None
) -> None:
    model = newer(name, scheme)
    before = model.SerializeToString()
    for other, opset in ((downgraded(model, 17), 17), (upgraded(model, 19), 19)):
        onnx.checker.check_model(other, full_check=True)
        assert opset_of(other) == opset
        assert [n.name for n in other.graph.node] == [n.name for n in model.graph.node]
        assert other.metadata_props == model.metadata_props
        same(model, other, image=digits().numpy())
    assert model.SerializeToString() == before


def test_the_exporter_writes_17_which_runtimes_of_that_time_can_read(
    network: Callable[..., nn.Module], newer: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    module = network("resnet", None)
    old, new = written(module, tmp_path / "17.onnx", 17), newer("resnet", None)
    assert (opset_of(old), old.ir_version) == (17, 8)  # onnx 1.12, which brought opset 17, reads format 8 at most
    assert all(len(n.input) == 1 for n in old.graph.node if n.op_type == "ReduceMean")
    same(new, old, image=digits().numpy())
    with pytest.raises(UsageError, match="opset 16 cannot be written") as error:
        written(module, tmp_path / "16.onnx", 16)
    assert "from 17 to" in str(error.value)


#: Nodes of opset 18 that read x [2, 3, 7, 8] and write y.
CHANGED = {
    "reduction": "axes = Constant<value_ints = [1, 3]>() y = ReduceMax<keepdims = 0>(x, axes)",
    "reduction of everything": "y = ReduceL2<keepdims = 0>(x)",
    "empty axes": "axes = Constant<value_ints = [0]>() none = Slice(axes, zero, zero) y = ReduceSum(x)",
    "reduction of nothing": "y = ReduceMean<noop_with_empty_axes = 1>(x)",
    "equal parts": "a, y = Split<axis = 3, num_outputs = 2>(x)",
    "a smaller last part": "y, a, b = Split<axis = 2, num_outputs = 3>(x)",
    "the smaller last part itself": "a, b, y = Split<axis = 2, num_outputs = 3>(x)",
    "pad of all axes": "pads = Constant<value_ints = [0, 1, 0, 2, 0, 0, 1, 1]>() y = Pad(x, pads)",
    "pad of chosen axes": "pads = Constant<value_ints = [1, 2, 3, 4]>() axes = Constant<value_ints = [3, -3]>()"
    " value = Constant<value_float = 0.5>() y = Pad(x, pads, value, axes)",
    "resize": "scales = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>()"
    ' y = Resize<mode = "linear", antialias = 0, keep_aspect_ratio_policy = "stretch">(x, , scales)',
    "mish": "y = Mish(x)",
    "group normalization": "s = Constant<value_floats = [2.0]>() b = Constant<value_floats = [1.0]>()"
    " y = GroupNormalization<num_groups = 1>(x, s, b)",
    "inside a branch": "yes = Constant<value = bool {1}>()"
    " y = If(yes) <then_branch = t () => (float[a, b, c, d] p)"
    " { axes = Constant<value_ints = [1]>() p = ReduceMean(x, axes) },"
    " else_branch = e () => (float[a, b, c, d] q) { q = Identity(x) }>",
}


def parsed(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> g (float[2, 3, 7, 8] x) => (y) <int64[1] zero = {{0}}> {{ {body} }}'
    )


@pytest.mark.parametrize("body", CHANGED.values(), ids=CHANGED)
def test_each_operator_that_18_changed_computes_the_same_in_17(body: str) -> None:
    model = parsed(body)
    # The parser gives the output no type; where shape inference finds none, it is that of the input.
    found = onnx.shape_inference.infer_shapes(model).graph.output[0].type
    model.graph.output[0].type.CopyFrom(found if found.HasField("tensor_type") else model.graph.input[0].type)
    other = downgraded(model, 17)
    onnx.checker.check_model(other, full_check=True)
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 8)).astype(np.float32)
    same(model, other, x=x)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("i = Cast<to = 7>(x) y = BitwiseNot(i)", "BitwiseNot is new in opset 18"),
        ("s = Shape(x) axes = Slice(s, zero, zero) y = ReduceMean(x, axes)", "constant axes"),
        (
            "scales = Constant<value_floats = [2.0]>() y = Resize<axes = [2]>(x, , scales)",
            "Resize of chosen axes is new in opset 18",
        ),
        (
            "scales = Constant<value_floats = [1.0, 1.0, 0.5, 0.5]>()"
            ' y = Resize<mode = "linear", antialias = 1>(x, , scales)',
            "Resize with antialias is new in opset 18",
        ),
        ("y = LpPool<kernel_shape = [2, 2], dilations = [2, 2]>(x)", "without dilations"),
        ('i = Cast<to = 7>(x) y = ScatterElements<reduction = "max">(x, i, x)', "reduction max or min"),
    ],
)
def test_what_17_cannot_express_is_refused_with_the_name_of_the_node(body: str, why: str) -> None:
    model = parsed(body)
    model.graph.node[-1].name = "the node"
    with pytest.raises(StageError, match=why) as error:
        downgraded(model, 17)
    assert str(error.value).startswith("the node: ")


def test_a_newer_file_is_refused_and_an_older_one_stays_as_it_is() -> None:
    model = parsed("y = Relu(x)")
    model.opset_import[0].version = 20
    with pytest.raises(StageError, match="opset 20 cannot be written in opset 17"):
        downgraded(model, 17)
    model.opset_import[0].version = 13
    assert downgraded(model, 17) == model
    assert upgraded(model, 11) == model
