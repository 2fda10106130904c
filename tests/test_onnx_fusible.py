"""Exported graphs in the forms that ONNX Runtime fuses: the same numbers bit for bit, in fewer kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.artifact import Preprocessing
from edgekd.models.vit import vit
from edgekd.onnx_edit import copied
from edgekd.onnx_file import export_onnx
from edgekd.onnx_fusible import fusible
from edgekd.quant import SCHEMES, calibrate, convert, prepare
from edgekd.runtimes.optimised import optimised_graph

SIZE = [1, 16, 16]


def images(count: int) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(0))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return vit(patch=4, dim=8, depth=2, heads=2, num_classes=10, in_channels=1, image_size=16).eval()


def quantized() -> nn.Module:
    prepared = prepare(transformer(), images(8), SCHEMES["x86-u8s8"], qat=False)
    calibrate(prepared, [images(32)])
    return convert(prepared.eval())


class ByHand(nn.Module):
    """GELU as people write it, and attention with its own transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = image * 0.5 * (1.0 + torch.erf(image * 0.5**0.5))
        x = F.scaled_dot_product_attention(x, 0.5 * x, x + 1.0)
        return self.linear(x.mean((1, 2)))


def written(network: nn.Module, path: Path, *, dynamic: bool) -> onnx.ModelProto:
    seen = Preprocessing(size=SIZE, mean=[0.0], std=[1.0])
    classes = [str(i) for i in range(10)]
    export_onnx(network, path, size=SIZE, opset=18, classes=classes, preprocessing=seen, dynamic_batch=dynamic)
    return onnx.load(path)


def ran(model: onnx.ModelProto, image: Tensor) -> np.ndarray:
    """As it stands: without the runtime's own optimisation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("make", [transformer, quantized, ByHand])
def test_the_same_bits_in_fewer_nodes(make, dynamic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make().eval()
    with monkeypatch.context() as patch:
        patch.setattr("edgekd.onnx_file.fusible", lambda model: None)
        plain = written(network, tmp_path / "plain.onnx", dynamic=dynamic)
    made = written(network, tmp_path / "made.onnx", dynamic=dynamic)
    image = images(5 if dynamic else 1)
    np.testing.assert_array_equal(ran(made, image), ran(plain, image))
    kinds = Counter(node.op_type for node in made.graph.node)
    assert kinds.total() < len(plain.graph.node)
    assert not kinds["Shape"]
    known = {name for node in made.graph.node for name in node.output}
    assert {value.name for value in made.graph.value_info} <= known


def test_onnx_runtime_fuses_every_gelu_and_transposes_no_keys(tmp_path: Path) -> None:
    written(transformer(), tmp_path / "made.onnx", dynamic=True)
    kinds = Counter(node.op_type for node in optimised_graph(tmp_path / "made.onnx").node)
    assert (kinds["BiasGelu"] + kinds["Gelu"], kinds["Erf"]) == (2, 0)
    assert kinds["FusedMatMul"] == 2  # queries and keys, with the transposition and the scale inside
    assert not {"Shape", "Slice", "Concat"} & set(kinds)


def graph(body: str, shapes: str = "") -> onnx.ModelProto:
    inputs = "float[N, 2, 3, 4] x, float[N, 2, 3, 4] z"
    numbers = f"float half = {{0.5}}, float third = {{0.33}}, float one = {{1.0}}, float root = {{1.4142135}}{shapes}"
    head = '<ir_version: 8, opset_import: ["" : 18]>'
    return onnx.parser.parse_model(f"{head} g ({inputs}) => (float[?] y) <{numbers}> {{ {body} }}")


ERF = "a = Div(x, root) b = Erf(a) c = Add(b, one)"
SHAPES = """, int64[1] every = {-1}, int64[1] m1 = {-1}, int64[1] m2 = {-2},
    int64[1] end = {9223372036854775807}, int64[1] start = {-9223372036854775808}"""
LENGTHS = """s = Shape(x) d = Slice(s, m1, end) n = Slice(s, m2, m1) b = Slice(s, start, m2)
    f = Concat<axis = 0>(every, n, d) flat = Reshape(x, f) t = Transpose<perm = [0, 2, 1]>(flat)"""


@pytest.mark.parametrize(
    ("body", "shapes", "changes"),
    [
        (f"{ERF} h = Mul(half, c) y = Mul(x, h)", "", True),
        (f"{ERF} h = Mul(c, half) y = Mul(h, x)", "", True),
        (f"{ERF} h = Mul(third, c) y = Mul(x, h)", "", False),
        (f"{ERF} h = Mul(half, c) y = Mul(z, h)", "", False),
        (f"{ERF} h = Mul(half, c) u = Mul(x, h) y = Add(u, h)", "", False),
        ("a = Div(x, root) b = Tanh(a) c = Add(b, one) h = Mul(half, c) y = Mul(x, h)", "", False),
        (f"{LENGTHS} g = Concat<axis = 0>(b, d, n) y = Reshape(t, g)", SHAPES, True),
        (f"{LENGTHS} g = Concat<axis = 0>(b, n, d) y = Reshape(t, g)", SHAPES, False),
        (f"{LENGTHS.replace('Shape(x)', 'Shape(z)')} g = Concat<axis = 0>(b, d, n) y = Reshape(t, g)", SHAPES, False),
        (f"{LENGTHS.replace('[0, 2, 1]', '[2, 1, 0]')} g = Concat<axis = 0>(b, d, n) y = Reshape(t, g)", SHAPES, False),
    ],
    ids=["gelu", "turned", "a third", "another", "read twice", "tanh", "keys", "unlike", "of another", "turned round"],
)
def test_only_what_is_meant_is_changed(body: str, shapes: str, changes: bool) -> None:
    before = graph(body, shapes)
    after = copied(before)
    fusible(after)
    onnx.checker.check_model(after)
    assert (list(after.graph.node) != list(before.graph.node)) == changes
    x, z = (torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(i)).numpy() for i in range(2))
    found = []
    for model in (before, after):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        found.append(session.run(None, {"x": x, "z": z})[0])
    np.testing.assert_array_equal(*found)
