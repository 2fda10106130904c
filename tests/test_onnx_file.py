"""Exported files: what they hold, what ONNX Runtime makes of them, and that they say what the network says."""

from __future__ import annotations

import getpass
import re
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd.artifact import Preprocessing
from edgekd.errors import StageError, UsageError
from edgekd.models.cifar_resnet import cifar_resnet
from edgekd.models.mobilenet import mobilenet
from edgekd.models.vit import vit
from edgekd.onnx_file import compare, export_onnx, optimised_layers, read_metadata
from edgekd.quant import SCHEMES, calibrate, convert, prepare
from edgekd.quant.fake_quantize import ActivationFakeQuantize

CLASSES = [str(d) for d in range(10)]
PREPROCESSING = Preprocessing(size=[1, 32, 32], mean=[0.3], std=[0.35], colour="grey")
SIZE = [1, 32, 32]


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feed: {"logits": opened.run(["logits"], feed)[0]}


def write(module: nn.Module, path: Path, **options: Any) -> Path:
    export_onnx(
        module,
        path,
        **{"size": SIZE, "opset": 18, "classes": CLASSES, "preprocessing": PREPROCESSING, **options},
    )
    return path


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """(bytes [360, 1, 32, 32], the same normalised)."""
    digits = torch.from_numpy(load_digits().images[:360]).float().unsqueeze(1) / 16
    raw = (F.interpolate(digits, size=32, mode="bilinear") * 255).round().to(torch.uint8)
    return raw, (raw.float() / 255 - 0.3) / 0.35


@pytest.fixture(scope="module")
def network(images: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    labels = torch.from_numpy(load_digits().target[:360])
    network = cifar_resnet(8, 8, num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(25):
        rows = torch.arange(step * 64, (step + 1) * 64) % 360
        outputs = network(images[1][rows])
        loss = F.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def prepared(network: nn.Module, images: tuple[Tensor, Tensor]) -> nn.Module:
    prepared = prepare(network, images[1][:8], SCHEMES["x86-u8s8"], qat=True)
    calibrate(prepared, images[1].split(90))
    return prepared.eval()


@pytest.fixture(scope="module")
def converted(prepared: nn.Module) -> nn.Module:
    return convert(prepared)


@pytest.fixture(scope="module")
def file(converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(converted, tmp_path_factory.mktemp("onnx") / "int8.onnx")


@pytest.fixture(scope="module")
def float_file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(network, tmp_path_factory.mktemp("onnx") / "float.onnx")


def test_the_file_agrees_with_the_network(file: Path, converted: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    found = compare(file, converted, images[1], session(file))
    assert found["images"] == 360
    assert found["argmax_agreement"] >= 0.995
    # Rounding ties and the last bit of a sum move single integers, not logits.
    assert found["max_abs_difference"] < 0.05 * found["max_abs_logit"]


def test_the_float_file_agrees_closely(float_file: Path, network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    found = compare(float_file, network, images[1], session(float_file))
    assert found["argmax_agreement"] == 1.0
    assert found["max_abs_difference"] < 1e-4 * max(1.0, found["max_abs_logit"])


def test_no_float_matrix_layer_is_left(file: Path, float_file: Path) -> None:
    assert optimised_layers(file) == {"int8": 8, "float": 0}
    assert optimised_layers(float_file) == {"int8": 0, "float": 8}


def test_weights_are_stored_as_int8(file: Path, float_file: Path, network: nn.Module) -> None:
    initializers = onnx.load(file).graph.initializer
    matrices = [i for i in initializers if len(i.dims) >= 2]
    assert {i.data_type for i in matrices} == {onnx.TensorProto.INT8}
    weights = [p for p in network.parameters() if p.dim() >= 2]
    assert sum(int(np.prod(i.dims)) for i in matrices) == sum(p.numel() for p in weights)
    assert file.stat().st_size < 0.6 * float_file.stat().st_size  # a tiny network: its structure weighs in both


def test_scales_are_those_of_the_training(file: Path, prepared: nn.Module) -> None:
    model = onnx.load(file)
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    constants |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"
    }
    pairs = {
        (float(constants[n.input[1]]), int(constants[n.input[2]]))
        for n in model.graph.node
        if n.op_type == "QuantizeLinear"
    }
    expected = {
        (m.scale.item(), m.zero_point.item()) for m in prepared.modules() if isinstance(m, ActivationFakeQuantize)
    }
    assert pairs == expected
    # The stem's integers, from its folded weight and a formula of our own.
    state = {k.removeprefix("network."): v.detach() for k, v in prepared.state_dict().items()}
    norm = next(k.removesuffix(".running_var") for k in state if k.endswith("running_var"))
    weight = next(v for k, v in state.items() if v.dim() == 4)
    factor = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-5)
    folded = (weight * factor.reshape(-1, 1, 1, 1)).numpy()
    scale = np.abs(folded).max(axis=(1, 2, 3)) / 127
    integers = np.rint(folded / scale.reshape(-1, 1, 1, 1)).astype(np.int8)
    stored = next(v for v in constants.values() if v.shape == integers.shape)
    assert np.abs(stored.astype(int) - integers).max() <= 1
    assert np.mean(stored == integers) > 0.98


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_any_batch(file: Path, images: tuple[Tensor, Tensor], batch: int) -> None:
    run = session(file)
    whole = run({"image": images[1][:20].numpy()})["logits"]
    np.testing.assert_allclose(run({"image": images[1][:batch].numpy()})["logits"], whole[:batch], atol=1e-5)


def test_the_interface(file: Path) -> None:
    model = onnx.load(file)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["batch", 1, 32, 32]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["batch", 10]
    assert {o.domain: o.version for o in model.opset_import}[""] == 18
    assert {n.domain for n in model.graph.node} <= {""}


def test_bytes_in_give_the_same_logits_in_another_opset(
    converted: nn.Module, file: Path, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    raw, normalised = images
    baked = write(converted, tmp_path / "bytes.onnx", input="uint8", opset=21, dynamic_batch=False)
    model = onnx.load(baked)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert {o.domain: o.version for o in model.opset_import}[""] == 21
    run = session(baked)
    expected = session(file)({"image": normalised[:16].numpy()})["logits"]
    found = np.concatenate([run({"image": raw[i : i + 1].numpy()})["logits"] for i in range(16)])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert compare(baked, converted, normalised[:16], run)["argmax_agreement"] == 1.0
    assert optimised_layers(baked)["float"] == 0
    assert read_metadata(baked)["input"] == "uint8"


def test_metadata_comes_back(file: Path) -> None:
    metadata = read_metadata(file)
    assert metadata["classes"] == CLASSES
    assert Preprocessing.model_validate(metadata["preprocessing"]) == PREPROCESSING


def test_no_trace_of_this_machine(file: Path, float_file: Path) -> None:
    here = [str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), str(Path.home()), "site-packages"]
    here += ["pkg.torch", f"/{getpass.getuser()}/"]
    host = re.compile(rb"\b" + re.escape(socket.gethostname()).encode() + rb"\b")
    for path in (file, float_file):
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            tensor.raw_data = b""  # a short host name is in any few thousand random bytes
        content = model.SerializeToString()
        assert [word for word in here if word.encode() in content] == []
        assert not host.search(content)


def test_the_exporter_is_silent(network: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), tmp_path / "a.onnx")
    optimised_layers(tmp_path / "a.onnx")
    assert capfd.readouterr() == ("", "")


def trained_a_little(network: nn.Module, images: Tensor) -> nn.Module:
    with torch.no_grad():
        network.train()
        network(images)
    return network.eval()


def test_depthwise_squeeze_excite_and_hardswish(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = trained_a_little(mobilenet(0.25, num_classes=10, in_channels=1), images[1][:64])
    prepared = prepare(network, images[1][:8], SCHEMES["x86-u8s8"], qat=False)
    calibrate(prepared, [images[1][:100]])
    converted = convert(prepared)
    path = write(converted, tmp_path / "mobile.onnx")
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules())
    assert optimised_layers(path) == {"int8": layers, "float": 0}
    assert compare(path, converted, images[1][:50], session(path))["argmax_agreement"] >= 0.9


def test_a_vision_transformer(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = vit(patch=8, dim=32, depth=2, heads=2, num_classes=10, in_channels=1, image_size=32)
    prepared = prepare(network, images[1][:8], SCHEMES["x86-u8s8"], qat=True)
    calibrate(prepared, [images[1][:100]])
    converted = convert(prepared)
    path = write(converted, tmp_path / "vit.onnx")
    found = compare(path, converted, images[1][:50], session(path))
    assert found["argmax_agreement"] >= 0.95
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules())
    assert optimised_layers(path)["int8"] >= layers


def test_tensorrt_placement(network: nn.Module, images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    prepared = prepare(network, images[1][:8], SCHEMES["trt-s8s8"], qat=True)
    calibrate(prepared, [images[1][:100]])
    model = onnx.load(write(convert(prepared), tmp_path / "trt.onnx"))
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    constants |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"
    }
    producer = {output: n for n in model.graph.node for output in n.output}
    kinds = Counter(n.op_type for n in model.graph.node)
    for node in model.graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            assert not constants[node.input[2]].any()
            assert constants[node.input[2]].dtype == np.int8
            assert (constants[node.input[1]] > 0).all()
        if node.op_type in {"Conv", "Gemm"}:
            assert [producer[i].op_type for i in node.input[:2]] == ["DequantizeLinear"] * 2
            assert all(i in constants for i in node.input[2:])  # float bias: an int32 one is refused
        if node.op_type == "Add":
            assert sorted(producer[i].op_type for i in node.input) == ["Conv", "DequantizeLinear"]
    assert kinds["Conv"] == 7
    assert kinds["Add"] == 3


class Untranslatable(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.svdvals(image.flatten(2))[:, :1].expand(-1, 10)


def test_problems_have_one_message(network: nn.Module, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="opset 9"):
        write(network, tmp_path / "a.onnx", opset=9)
    with pytest.raises(StageError, match="cannot be exported to ONNX"):
        write(Untranslatable(), tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="no ONNX file"):
        read_metadata(tmp_path / "none.onnx")
    for name, content in {
        "text.onnx": b"hello, world",
        "empty.onnx": b"",
        "half.onnx": file.read_bytes()[: file.stat().st_size // 2],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="not an ONNX file, or a truncated one"):
            read_metadata(tmp_path / name)
        with pytest.raises(UsageError, match="not an ONNX file, or a truncated one"):
            optimised_layers(tmp_path / name)
    with pytest.raises(UsageError, match="too few"):
        compare(file, network, torch.zeros(0, 1, 32, 32), session(file))


def test_files_of_other_tools_have_no_metadata(tmp_path: Path) -> None:
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 10]) for name in ("image", "logits")
    ]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["image"], ["logits"])], "plain", values[:1], values[1:]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "p.onnx")
    assert read_metadata(tmp_path / "p.onnx") == {}
