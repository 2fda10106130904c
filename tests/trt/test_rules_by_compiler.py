"""The same files given to TensorRT-RTX: what the rules say is what the compiler does."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from wrong_files import RIGHT_FILES, WRONG_FILES, WrongFile

from edgekd.errors import StageError
from edgekd.trt.compiler import compile_onnx
from edgekd.trt.layers import EngineLayer, engine_layers
from edgekd.trt.matrix import MATRIX

pytest.importorskip("tensorrt_rtx_bindings")

PRODUCTS = {"correlation", "deconv", "gemm", "runtime_fusion"}


def compiled(model: onnx.ModelProto, directory: Path) -> list[EngineLayer] | None:
    """The engine's layers; None where there is no engine."""
    path = directory / "model.onnx"
    onnx.save(model, path)
    try:
        told = compile_onnx(path, "8.6")
    except StageError:  # the parser crashed
        return None
    return engine_layers(told.log) if told.ok else None


def is_int8(node: str, layers: list[EngineLayer]) -> bool:
    """Whether the engine multiplies integers for a node: both factors are int8 as they come."""
    products = [layer for layer in layers if node in layer.nodes and layer.type in PRODUCTS]
    return any([*product.inputs, *product.constants][:2] == ["int8", "int8"] for product in products)


@pytest.mark.parametrize("file", WRONG_FILES, ids=lambda file: file.name)
def test_the_compiler_does_to_a_wrong_file_what_the_rule_says(file: WrongFile, tmp_path: Path) -> None:
    layers = compiled(file.build(), tmp_path)
    assert (layers is None) == (file.does == "refused")
    if layers is None:
        return
    if file.does == "float" and file.rule == "residual-add":
        # The kernel that adds reads both branches as float; see the quantized skip below.
        [addition] = [layer for layer in layers if "add" in layer.nodes]
        assert addition.inputs == ("fp32", "fp32")
    elif file.does == "float":
        assert not is_int8(file.layer, layers)
    elif file.rule == "uint8":
        # Read as int8, which ends at 127, where the file says uint8.
        assert next(layer.outputs for layer in layers if any("quantize" in n for n in layer.nodes)) == ("int8",)


@pytest.mark.parametrize("name", RIGHT_FILES)
def test_the_compiler_multiplies_integers_in_every_layer_that_a_right_file_quantizes(name: str, tmp_path: Path) -> None:
    model = RIGHT_FILES[name]()
    layers = compiled(model, tmp_path)
    assert layers is not None
    for node in model.graph.node:
        if node.op_type in MATRIX:
            assert is_int8(node.name, layers) == (node.name != "head")


def test_a_quantized_skip_is_read_as_integers(tmp_path: Path) -> None:
    layers = compiled(RIGHT_FILES["quantized_skip"](), tmp_path)
    assert layers is not None
    [addition] = [layer for layer in layers if "add" in layer.nodes]
    assert "int8" in addition.inputs
