"""Operations, bytes and times of files against counters and formulas that are independent of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from estimated_files import SHEET, convolution, device, save, write
from onnx import helper
from torch import Tensor, nn

from edgekd.errors import UsageError
from edgekd.estimate import Roofline, roofline
from edgekd.models.cifar_resnet import cifar_resnet
from edgekd.models.count import count
from edgekd.models.mobilenet import mobilenet
from edgekd.models.vit import vit
from edgekd.pruning.search import count_macs
from edgekd.quant import SCHEMES, calibrate, convert, prepare


def trained(network: nn.Module) -> nn.Module:
    """As if it had seen images: norms that know nothing leave convolutions without a bias."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    return network.eval()


NETWORKS: dict[str, tuple[nn.Module, list[int]]] = {
    "resnet": (trained(cifar_resnet(8, 8)), [3, 16, 16]),
    "mobilenet": (trained(mobilenet(0.5)), [3, 32, 32]),
    "vit": (trained(vit(dim=24, depth=2, heads=2, image_size=16)), [3, 16, 16]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("networks")
    return {name: write(network, directory / f"{name}.onnx", size) for name, (network, size) in NETWORKS.items()}


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    prepared = prepare(NETWORKS["resnet"][0], images, SCHEMES["trt-s8s8"], qat=False)
    calibrate(prepared, [images])
    return write(convert(prepared), tmp_path_factory.mktemp("int8") / "int8.onnx", [3, 16, 16])


@pytest.mark.parametrize("name", list(NETWORKS))
def test_macs_are_those_of_the_projects_own_counters(files: dict[str, Path], name: str) -> None:
    network, size = NETWORKS[name]
    found = roofline(files[name], device())
    assert found.macs == count(network, size)[1] == count_macs(network, torch.zeros(1, *size))
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert roofline(files[name], device(), batch=3).macs == 3 * found.macs


def traffic(network: nn.Module, size: list[int]) -> dict[str, tuple[int, int, int]]:
    """Elements that each convolution and linear layer of a CIFAR ResNet reads and writes, seen as it runs.

    (weights and bias, activations read, written). The second convolution of a block reads the block's input, too: of
    a padded shortcut every second pixel.
    """
    seen: dict[str, tuple[int, int, int]] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def hook(module: Any, given: tuple[Tensor, ...], made: Tensor, name: str = name) -> None:
                outputs = module.weight.shape[0]  # a bias each, once the batch norm is folded
                seen[name] = (module.weight.numel() + outputs, given[0].numel(), made.numel())

            hooks.append(module.register_forward_hook(hook))
        if name.count(".") == 1 and name.startswith("layer"):

            def add(block: Any, given: tuple[Tensor, ...], made: Tensor, name: str = name) -> None:
                weights, read, written = seen[f"{name}.conv2"]
                skipped = given[0].numel() // (1 if given[0].shape == made.shape else 4)
                seen[f"{name}.conv2"] = (weights, read + skipped, written)

            hooks.append(module.register_forward_hook(add))
    with torch.no_grad():
        network(torch.zeros(1, *size))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("precision", "size_of"), [("fp32", 4), ("fp16", 2)])
def test_bytes_are_those_that_the_layers_hand_on(files: dict[str, Path], precision: Any, size_of: int) -> None:
    expected = traffic(*NETWORKS["resnet"])
    layers = {layer.name: layer for layer in roofline(files["resnet"], device(), precision=precision).layers}
    for name, (weights, read, written) in expected.items():
        layer = layers.pop(name)
        assert layer.precision == precision
        assert layer.weight_bytes == size_of * weights
        # Images and logits have the types of the file.
        assert layer.read_bytes == (4 if name == "conv1" else size_of) * read
        assert layer.written_bytes == (4 if name == "linear" else size_of) * written
    (pooling,) = layers.values()
    assert (pooling.ops, pooling.read_bytes, pooling.macs) == ("ReduceMean", size_of * 32 * 4 * 4, 0)


def test_a_quantized_files_layers_hand_on_bytes(int8: Path) -> None:
    expected = traffic(*NETWORKS["resnet"])
    found = roofline(int8, device())
    layers = {layer.name: layer for layer in found.layers}
    assert found.precision == "int8"
    assert found.macs == count(*NETWORKS["resnet"])[1]
    assert found.layers[0].ops == "QuantizeLinear"
    assert (found.layers[0].read_bytes, found.layers[0].written_bytes) == (4 * 768, 768)
    for name, (weights, read, _) in expected.items():
        layer = layers[name]
        outputs = int(onnx_weights(int8, name))
        assert layer.precision == "int8"
        assert layer.weight_bytes == (weights - outputs) + 4 * outputs  # biases stay float
        assert layer.compute_ms == pytest.approx(2 * layer.macs / 8e9)
        if not name.endswith("conv2"):
            assert layer.read_bytes == read
    # The skip of an identity block is quantized for the add: one byte each, as the sum's own output.
    assert layers["layer1.0.conv2"].read_bytes == expected["layer1.0.conv2"][1]


def onnx_weights(path: Path, name: str) -> int:
    """Output channels of a layer."""
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.name == name)
    made = {o: n for n in model.graph.node for o in n.output}
    integers = made[node.input[1]]
    while integers.op_type != "DequantizeLinear":
        integers = made[integers.input[0]]
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    shape = shapes.get(integers.input[0])
    if shape is None:
        shape = shapes[made[integers.input[0]].input[0]]
    return shape[0]


def test_nodes_are_fused_as_runtimes_do(files: dict[str, Path]) -> None:
    ops = {name: {x.name: x.ops for x in roofline(files[name], device()).layers} for name in files}
    assert ops["resnet"]["layer1.0.conv1"] == "Conv+Relu"
    assert ops["resnet"]["layer1.0.conv2"] == "Conv+Add+Relu"
    assert ops["mobilenet"]["blocks.3.excite.expand"] == "Conv+HardSigmoid+Mul"
    assert ops["mobilenet"]["blocks.3.depthwise.0"] == "Conv+HardSwish"
    assert ops["vit"]["blocks.0.fc1"].startswith("MatMul+Add+Div+Erf")
    (attention,) = {o for o in ops["vit"].values() if "Softmax" in o}
    assert attention == "MatMul+Softmax+MatMul"


def test_attention_keeps_its_scores_to_itself(files: dict[str, Path]) -> None:
    found = roofline(files["vit"], device())
    layers = [layer for layer in found.layers if "Softmax" in layer.ops]
    tokens, dim = 16, 24
    for layer in layers:
        assert layer.macs == 2 * tokens * tokens * dim
        assert layer.read_bytes == 4 * 3 * tokens * dim  # queries, keys, values
        assert layer.written_bytes == 4 * tokens * dim
        assert layer.weight_bytes == 0
    assert len(layers) == 2


def test_the_time_is_that_of_operations_or_of_bytes(tmp_path: Path) -> None:
    file = convolution(tmp_path / "conv.onnx", kernel=3)
    found = roofline(file, device(datasheet={"bandwidth_gb_s": 1000.0}))
    macs = 32 * 16 * 16 * 8 * 9
    assert (found.macs, found.bound) == (macs, "compute")
    assert found.ms == pytest.approx(2 * macs / 1e9)
    moved = 4 * (32 * 8 * 9 + 32 + 8 * 256 + 32 * 256)
    slow = roofline(file, device(datasheet={"bandwidth_gb_s": 0.01}))
    assert (slow.moved_bytes, slow.bound) == (moved, "memory")
    assert slow.ms == pytest.approx(moved / 1e4)
    assert [x.ms for x in slow.layers] == [pytest.approx(moved / 1e4)]


def test_the_peak_is_that_of_the_layers_precision(tmp_path: Path) -> None:
    macs = 32 * 16 * 16 * 8
    single = convolution(tmp_path / "fp32.onnx", 1)
    half = convolution(tmp_path / "fp16.onnx", 1, dtype=np.float16)

    def compute(file: Path, profile: Any, **options: Any) -> tuple[str, float]:
        (layer,) = roofline(file, profile, **options).layers
        return layer.precision, 2 * macs / layer.compute_ms

    assert compute(single, device()) == ("fp32", pytest.approx(1e9))
    assert compute(half, device()) == ("fp16", pytest.approx(4e9))
    assert compute(single, device(), precision="fp16") == ("fp16", pytest.approx(4e9))
    # TF32 on tensor cores from compute capability 8 on.
    assert compute(single, device(compute_capability="8.7")) == ("fp32", pytest.approx(2e9))
    assert compute(single, device(compute_capability="7.5")) == ("fp32", pytest.approx(1e9))
    with pytest.raises(UsageError, match="no figure for bf16") as raised:
        compute(single, device(), precision="bf16")
    assert "bf16_tflops" in str(raised.value.problem.hint)


def test_a_builder_that_chooses_types_takes_fp16_beside_int8(int8: Path) -> None:
    def reduced(**changes: Any) -> str:
        found = roofline(int8, device(precisions=["fp16", "int8"], runtime="tensorrt", **changes))
        layer = next(x for x in found.layers if x.name == "layer1.0.conv1")
        assert layer.precision == "int8"
        return "fp16" if layer.weight_bytes == 8 * 8 * 9 + 2 * 8 else "fp32"

    assert reduced(tensorrt={"version": "10.3"}) == "fp16"
    assert reduced(tensorrt={"version": "11.0"}) == "fp32"  # strongly typed: as the file says
    assert reduced() == "fp32"


def test_the_lower_bound_grants_the_fastest_algorithm_and_the_caches(tmp_path: Path) -> None:
    three, one = convolution(tmp_path / "3.onnx", 3), convolution(tmp_path / "1.onnx", 1)
    macs = 32 * 16 * 16 * 8
    assert roofline(one, device()).floor_ms == pytest.approx(2 * macs / 1e9)
    # F(6x6, 3x3): 8 * 8 multiplications for 6 * 6 * 9.
    assert roofline(three, device()).floor_ms == pytest.approx(2 * 9 * macs / 1e9 / (6 * 6 * 9 / 64))
    strided = convolution(tmp_path / "s.onnx", 3, strides=[2, 2])
    assert roofline(strided, device()).floor_ms == pytest.approx(2 * 9 * macs / 4 / 1e9)
    # Weights, image and result, as far as they do not fit.
    needed = 4 * (32 * 8 + 32 + 8 * 256 + 32 * 256)
    slow = {"bandwidth_gb_s": 0.001}
    assert roofline(one, device(datasheet=slow)).floor_ms == pytest.approx(2 * macs / 1e9)
    found = roofline(one, device(datasheet={**slow, "cache_mb": 0.01}))
    assert found.floor_ms == pytest.approx((needed - 1e4) / 1e3)
    assert roofline(one, device(datasheet={**slow, "cache_mb": 1.0})).floor_ms == pytest.approx(2 * macs / 1e9)


def sheets() -> Iterator[dict[str, Any]]:
    for bandwidth in (0.01, 10.0, 1e5):
        for cache in (None, 1e-6, 4.0):
            yield {"bandwidth_gb_s": bandwidth, "cache_mb": cache}


def test_no_lower_bound_lies_above_the_roofline(files: dict[str, Path], int8: Path) -> None:
    for file in (*files.values(), int8):
        for sheet in sheets():
            found = roofline(file, device(datasheet=sheet))
            assert 0 < found.floor_ms <= found.ms * (1 + 1e-9)


def test_a_batch_moves_weights_once(files: dict[str, Path], tmp_path: Path) -> None:
    one, eight = (roofline(files["resnet"], device(), batch=n) for n in (1, 8))

    def sums(found: Roofline) -> tuple[int, int]:
        return sum(x.weight_bytes for x in found.layers), sum(x.read_bytes + x.written_bytes for x in found.layers)

    assert sums(eight) == (sums(one)[0], 8 * sums(one)[1])
    assert roofline(files["resnet"], device(protocol={"batch": 8})) == eight
    fixed = roofline(convolution(tmp_path / "fixed.onnx", batch=2), device())
    assert (fixed.batch, fixed.notes) == (2, ["made for a batch of 2, not 1"])


def test_what_is_not_needed_or_shared_counts_no_more_than_once(tmp_path: Path) -> None:
    weight = np.ones((64, 64), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
        helper.make_node("MatMul", ["x", "w"], ["unused"]),
    ]
    file = save(tmp_path / "tied.onnx", nodes, {"x": ["n", 64]}, ["y"], w=weight)
    found = roofline(file, device(datasheet={"bandwidth_gb_s": 1e-3, "cache_mb": 1e-6}))
    assert found.macs == 2 * 64 * 64
    assert found.floor_ms == pytest.approx((4 * (64 * 64 + 2 * 64) - 1) / 1e3)


def test_a_tensor_that_two_layers_read_is_written_once_and_read_by_each(tmp_path: Path) -> None:
    w = np.ones((8, 8), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="left"),
        helper.make_node("MatMul", ["a", "w"], ["c"], name="right"),
        helper.make_node("Concat", ["b", "c"], ["y"], axis=1),
    ]
    file = save(tmp_path / "fork.onnx", nodes, {"x": ["n", 8]}, ["y"], w=w)
    moved = {x.name: (x.read_bytes, x.written_bytes) for x in roofline(file, device()).layers}
    assert moved == {"first": (32, 32), "left": (32, 32), "right": (32, 32)}


def test_bad_input_has_one_message(tmp_path: Path) -> None:
    good = convolution(tmp_path / "good.onnx")
    without = device().model_copy(update={"datasheet": None})
    open_size = save(tmp_path / "open.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 3, "h", "w"]}, ["y"])
    custom = helper.make_node("Foo", ["x"], ["f"], name="foo", domain="them")
    unknown = save(tmp_path / "own.onnx", [custom, helper.make_node("Relu", ["f"], ["y"])], {"x": ["n", 3]}, ["y"])
    text = tmp_path / "text.onnx"
    text.write_text("no graph")
    for file, profile, said in (
        (good, without, "no datasheet"),
        (open_size, device(), "open sizes beside the batch"),
        (unknown, device(), "the size of what Foo 'foo' gives is not known"),
        (text, device(), "not an ONNX file"),
        (tmp_path / "none.onnx", device(), "no ONNX file"),
    ):
        with pytest.raises(UsageError, match=said):
            roofline(file, profile)
    assert SHEET["source"] == "made up"


@pytest.fixture(scope="module")
def half(files: dict[str, Path]) -> Path:
    """The ViT as a file that is typed fp16."""
    from edgekd.trt.half import in_half

    path = files["vit"].with_name("vit.fp16.onnx")
    onnx.save(in_half(onnx.load(files["vit"])), path)
    return path


def test_a_file_of_fp16_and_the_wish_for_it_agree(files: dict[str, Path], half: Path) -> None:
    typed, wished = roofline(half, device()), roofline(files["vit"], device(), precision="fp16")
    assert (typed.precision, typed.macs) == (wished.precision, wished.macs) == ("fp16", wished.macs)
    inner = {x.name: (x.precision, x.moved_bytes) for x in wished.layers if x.name.startswith("blocks.")}
    assert {x.name: (x.precision, x.moved_bytes) for x in typed.layers if x.name in inner} == inner


def test_a_real_compiler_fuses_what_is_counted_as_fused(half: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    from edgekd.trt.compiler import compile_onnx
    from edgekd.trt.layers import engine_layers

    kernels = [k for k in engine_layers(compile_onnx(half, "8.6").log) if k.outputs]
    ours = roofline(half, device()).layers
    assert len(ours) <= len(kernels)  # less may be fused there, more would be no bound
    kinds = {n.name: n.op_type for n in onnx.load(half).graph.node}
    counted = {x.name: x.ops for x in ours}
    for block in range(2):
        for layer, op in (("attn", "Softmax"), ("fc1", "Erf"), ("attn.proj", "Add")):
            name = f"blocks.{block}.{layer}"
            assert op in counted[name].split("+")
            assert any(name in k.nodes and op in {kinds.get(n) for n in k.nodes} for k in kernels), (name, op)
