"""Against lines that TensorRT-RTX wrote: what each file under logs/ was compiled from stands in its first line."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.trt.layers import EngineLayer, engine_layers

LOGS = Path(__file__).with_name("logs")


def recorded(name):
    return engine_layers((LOGS / f"{name}.txt").read_text())


def test_layers_of_a_quantized_network_have_types_and_the_nodes_that_they_came_from():
    layers = recorded("resnet8-int8")
    assert [layer.type for layer in layers] == ["shape_call", "kgen", "correlation", "kgen", "gemm", "kgen"]
    assert layers[2] == EngineLayer(
        name="conv1_myl0_2",
        type="correlation",
        inputs=("int8",),
        constants=("int8", "fp32", "fp32"),
        outputs=("fp32",),
        nodes=("conv1", "node_dequantize_per_tensor", "node_dequantize_per_channel_1"),
    )
    assert layers[3].outputs == ("int8",)
    assert layers[3].nodes == ("node_relu", "node_quantize_per_tensor_1")
    assert layers[4].name == "linear_myl0_16"
    assert layers[0] == EngineLayer("__mye1574_0_myl0_0", "shape_call", (), (), (), ())


def test_a_residual_in_fp16_is_the_second_input_of_its_convolution():
    _, convolution = recorded("resnet8-fp16")
    assert convolution.inputs == ("fp16", "fp16")
    assert convolution.constants == ("fp16", "fp32", "fp32")
    assert convolution.nodes == ("node_Conv_187", "node_relu_2", "node_add_60")


def test_attention_is_one_layer_of_two_products():
    by_name = {layer.name: layer for layer in recorded("vit-fp16")}
    attention = by_name["_gemm_mha_v2_myl0_6"]
    assert attention.inputs == ("fp16", "fp16", "fp16")
    assert attention.nodes == ("node_scaled_dot_product_attention", "node_Softmax_57", "node_MatMul_56")
    assert by_name["__myl_FcAdd_myl0_4"].type == "runtime_fusion"


def test_a_weight_that_is_int8_beside_an_fp16_input_is_told():
    (product,) = recorded("weight-only")
    assert (product.inputs, product.constants, product.outputs) == (("fp16",), ("fp16", "int8"), ("fp16",))


@pytest.mark.parametrize(
    "log", ["", "VERBOSE: Layers:\n", "Name: image, IOMode: Input\nName: x, LayerType: kgen, Inputs"]
)
def test_no_layers_where_nothing_was_built(log):
    assert engine_layers(log) == []
