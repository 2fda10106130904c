"""Each tool at work, with the settings that suit ONNX Runtime best: run by quantization.py, one tool a process.

    python quantization_tools.py TOOL DIRECTORY FILE

DIRECTORY holds spec.json and model.safetensors (a float network), float.onnx and images.npy (calibration images
float32 [N, 3, 32, 32], normalised). FILE gets the tool's ONNX file; what is printed last is a JSON of the seconds that
the tool took (imports, reading and writing of inputs left out) and the lines that its use took.

A tool's function and what it calls here is what a user writes to come from a float PyTorch network, its ONNX file and
the images to an int8 ONNX file. Networks are edgekd's (the repository is on the path); nothing else here is.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

BATCH = 64
Batches = list[torch.Tensor]


def onnxruntime_static(network: nn.Module, images: Batches, plain: Path, out: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"image": batch.numpy()}

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(plain), str(prepared))
    quantize_static(
        str(prepared),
        str(out),
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def onnxruntime_products(network: nn.Module, images: Batches, plain: Path, out: Path) -> None:
    """Of a transformer only the products with weights, without their outputs."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"image": batch.numpy()}

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(plain), str(prepared))
    graph = onnx.load(prepared).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    quantize_static(
        str(prepared),
        str(out),
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=products,
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )


def onnxruntime_dynamic(network: nn.Module, images: Batches, plain: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(plain), str(prepared))
    quantize_dynamic(
        str(prepared), str(out), op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8
    )


def nncf(network: nn.Module, images: Batches, plain: Path, out: Path) -> None:
    import nncf
    import onnx

    model = onnx.load(plain)
    dataset = nncf.Dataset(images, lambda batch: {"image": batch.numpy()})
    quantized = nncf.quantize(model, dataset, preset=nncf.QuantizationPreset.PERFORMANCE, subset_size=len(images))
    onnx.save(quantized, out)


def nncf_transformer(network: nn.Module, images: Batches, plain: Path, out: Path) -> None:
    import nncf
    import onnx

    model = onnx.load(plain)
    dataset = nncf.Dataset(images, lambda batch: {"image": batch.numpy()})
    quantized = nncf.quantize(
        model,
        dataset,
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    onnx.save(quantized, out)


def torchao(network: nn.Module, images: Batches, plain: Path, out: Path) -> None:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as xiq
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    axes = {"image": {0: torch.export.Dim("batch", min=1, max=1024)}}
    exported = torch.export.export(network, (images[0],), dynamic_shapes=axes).module()
    quantizer = xiq.X86InductorQuantizer().set_global(xiq.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in images:
            prepared(batch)
    converted = move_exported_model_to_eval(convert_pt2e(prepared))
    export_quantized(converted, images[0], out)


def neural_compressor(network: nn.Module, images: Batches, plain: Path, out: Path) -> None:
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import INT8StaticQuantConfig, convert, prepare

    axes = {"image": {0: torch.export.Dim("batch", min=1, max=1024)}}
    prepared = prepare(export(network, (images[0],), dynamic_shapes=axes), INT8StaticQuantConfig())
    with torch.no_grad():
        for batch in images:
            prepared(batch)
    export_quantized(convert(prepared), images[0], out)


def export_quantized(converted: nn.Module, example: torch.Tensor, out: Path) -> None:
    """Neither torchao nor Neural Compressor writes ONNX: PyTorch's exporter does, told what their operators are."""
    import onnx
    from onnxscript import opset18 as op

    operators = torch.ops.quantized_decomposed

    def pair(scale: float, zero_point: int, dtype: int) -> list[Any]:
        kinds = [(onnx.TensorProto.FLOAT, scale), (int(dtype), zero_point)]
        return [op.Constant(value=onnx.helper.make_tensor("value", kind, [], [value])) for kind, value in kinds]

    def quantize(x: Any, scale: float, zero_point: int, low: int, high: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, *pair(scale, zero_point, dtype))

    def dequantize(x: Any, scale: float, zero_point: int, low: int, high: int, dtype: int, **_: Any) -> Any:
        return op.DequantizeLinear(x, *pair(scale, zero_point, dtype))

    def quantize_channels(x: Any, scales: Any, zeros: Any, axis: int, low: int, high: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, scales, op.Cast(zeros, to=int(dtype)), axis=axis)

    def dequantize_channels(
        x: Any, scales: Any, zeros: Any, axis: int, low: int, high: int, dtype: int, **_: Any
    ) -> Any:
        return op.DequantizeLinear(x, scales, op.Cast(zeros, to=int(dtype)), axis=axis)

    class Evaluating(nn.Module):  # the exporter calls eval(), which exported networks refuse
        def __init__(self) -> None:
            super().__init__()
            self.network = [converted]
            self.training = False

        def eval(self) -> nn.Module:
            return self

        def train(self, mode: bool = True) -> nn.Module:
            return self

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.network[0](image)

    torch.onnx.export(
        Evaluating(),
        (example,),
        str(out),
        dynamo=True,
        opset_version=18,
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=1024)}},
        custom_translation_table={
            operators.quantize_per_tensor.default: quantize,
            operators.dequantize_per_tensor.default: dequantize,
            operators.quantize_per_channel.default: quantize_channels,
            operators.dequantize_per_channel.default: dequantize_channels,
        },
    )


def modelopt(network: nn.Module, images: Batches, plain: Path, out: Path) -> None:
    import modelopt.torch.quantization as mtq
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    modules = dict(network.named_modules())
    for name, module in list(modules.items()):  # batch norms behind quantized weights stay in the file otherwise
        before = norm_behind(network, name)
        if before is not None:
            replace(network, name, fuse_conv_bn_eval(module, modules[before]))
            replace(network, before, nn.Identity())

    def calibrate(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in images:
                model(batch)

    quantized = mtq.quantize(network, mtq.INT8_DEFAULT_CFG, calibrate)
    # Its quantizers branch on values, which PyTorch's new exporter does not follow.
    torch.onnx.export(
        quantized,
        (images[0][:2],),
        str(out),
        dynamo=False,
        opset_version=18,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )


def norm_behind(network: nn.Module, name: str) -> str | None:
    """The batch norm that a convolution's output goes through, by the graph."""
    traced = torch.fx.symbolic_trace(network)
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "call_module" and node.target == name and isinstance(modules[name], nn.Conv2d):
            users = list(node.users)
            if len(users) == 1 and isinstance(modules.get(str(users[0].target)), nn.BatchNorm2d):
                return str(users[0].target)
    return None


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(path), leaf, module)


#: Tool -> its function and what else of this file a user would have to write.
TOOLS: dict[str, tuple[Callable[..., None], ...]] = {
    "onnxruntime-static": (onnxruntime_static,),
    "onnxruntime-products": (onnxruntime_products,),
    "onnxruntime-dynamic": (onnxruntime_dynamic,),
    "nncf": (nncf,),
    "nncf-transformer": (nncf_transformer,),
    "torchao-x86": (torchao, export_quantized),
    "neural-compressor": (neural_compressor, export_quantized),
    "modelopt": (modelopt, norm_behind, replace),
}


#: What is imported before the clock runs.
PACKAGES = {
    "onnxruntime": "onnxruntime.quantization",
    "nncf": "nncf",
    "torchao": "torchao.quantization.pt2e.quantize_pt2e",
    "neural": "neural_compressor.torch.quantization",
    "modelopt": "modelopt.torch.quantization",
}


def lines(functions: tuple[Callable[..., Any], ...]) -> int:
    """Of code: neither blank, nor a comment, nor a docstring."""
    count = 0
    for function in functions:
        doc = len((function.__doc__ or "").splitlines())
        rows = [row.strip() for row in inspect.getsource(function).splitlines()]
        count += sum(1 for row in rows if row and not row.startswith("#")) - doc
    return count


class Logits(nn.Module):
    """A network that returns logits alone, under the input name `image`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from safetensors.torch import load_file

    from edgekd.artifact import ModelSpec
    from edgekd.models import build

    tool, directory, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    network = build(ModelSpec.model_validate_json((directory / "spec.json").read_text()))
    network.load_state_dict(load_file(directory / "model.safetensors"))
    images = list(torch.from_numpy(np.load(directory / "images.npy", allow_pickle=False)).split(BATCH))
    imported = time.monotonic()
    importlib.import_module(PACKAGES[tool.partition("-")[0]])
    began = time.monotonic()
    TOOLS[tool][0](Logits(network).eval(), images, directory / "float.onnx", out)
    found = {"seconds": round(time.monotonic() - began, 2), "import_seconds": round(began - imported, 2)}
    print(json.dumps({**found, "lines": lines(TOOLS[tool])}))


if __name__ == "__main__":
    main()
