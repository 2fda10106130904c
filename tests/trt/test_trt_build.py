"""Networks, configurations and engines through TensorRT's API, with TensorRT-RTX, which needs no GPU to build.

It is strongly typed always, as TensorRT 11 is; what only weakly typed builds have is not run here.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import StageError
from edgekd.profile import Profile, TensorRT
from edgekd.runtimes.engine_file import BatchRange
from edgekd.trt.build import batches_of
from edgekd.trt.network import configured, parsed, ranges, serialized, with_profile

trt = pytest.importorskip("tensorrt_rtx_bindings")


def profile(**changes) -> Profile:
    table = {"name": "here", "description": "", "device": "gpu", "runtime": "tensorrt", "compute_capability": "8.9"}
    return Profile.model_validate({**table, "tensorrt": {"version": "10.3"}, **changes})


def saved(path, nodes, inputs, outputs, constants=(), opset=17, domains=()):
    weights = [numpy_helper.from_array(array, name) for name, array in dict(constants).items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def convolution(path, batch="batch", kind=TensorProto.FLOAT):
    """image [batch, 4, 8, 8] -> Conv -> Relu -> logits [batch, 8, 8, 8]."""
    weights = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(helper.tensor_dtype_to_np_dtype(kind))
    return saved(
        path,
        [
            helper.make_node("Conv", ["image", "w"], ["c"], name="first/Conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["logits"], name="first/Relu"),
        ],
        [helper.make_tensor_value_info("image", kind, [batch, 4, 8, 8])],
        [helper.make_tensor_value_info("logits", kind, [batch, 8, 8, 8])],
        {"w": weights},
    )


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    return convolution(tmp_path_factory.mktemp("files") / "dynamic.onnx")


def test_the_network_has_the_files_inputs_types_and_outputs(tmp_path):
    made = parsed(trt, convolution(tmp_path / "half.onnx", kind=TensorProto.FLOAT16), strongly_typed=True)
    assert made.typed
    assert made.network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    image = made.network.get_input(0)
    assert (image.name, tuple(image.shape), image.dtype) == ("image", (-1, 4, 8, 8), trt.DataType.HALF)
    assert made.network.get_output(0).dtype == trt.DataType.HALF


def test_a_custom_operator_is_refused_by_node_and_file(tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="block/relu"),
        helper.make_node("Swirl", ["r"], ["y"], name="block/swirl", domain="com.example"),
    ]
    file = saved(tmp_path / "custom.onnx", nodes, value[:1], value[1:], domains=["com.example"])
    with pytest.raises(StageError) as error:
        parsed(trt, file, strongly_typed=False)
    assert "custom.onnx:block/swirl (Swirl)" in str(error.value)
    assert "block/relu" not in str(error.value)
    assert "plugin" in str(error.value)
    assert error.value.exit_code == 3


def test_another_text_is_no_network(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(StageError, match=r"text\.onnx"):
        parsed(trt, tmp_path / "text.onnx", strongly_typed=False)


def test_ranges_span_the_batches_that_the_profile_measures(dynamic):
    network = parsed(trt, dynamic, strongly_typed=False).network
    batches = batches_of(profile(protocol={"batch": 2, "batches": [1, 16]}))
    assert batches == (1, 2, 16)
    assert ranges(network, batches, dynamic) == {
        "image": BatchRange(smallest=[1, 4, 8, 8], tuned=[2, 4, 8, 8], largest=[16, 4, 8, 8])
    }


def test_a_static_file_has_one_shape(tmp_path):
    file = convolution(tmp_path / "static.onnx", batch=3)
    found = ranges(parsed(trt, file, strongly_typed=False).network, (1, 1, 8), file)
    assert found["image"].smallest == found["image"].largest == [3, 4, 8, 8]


def test_another_open_axis_is_an_error_that_names_it(tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, "rows"]) for name in ("x", "y")]
    file = saved(tmp_path / "rows.onnx", [helper.make_node("Relu", ["x"], ["y"])], value[:1], value[1:])
    with pytest.raises(StageError, match=r"'x' has the shape \[-1, 4, -1\]: axis 2 is open"):
        ranges(parsed(trt, file, strongly_typed=False).network, (1, 1, 8), file)


def test_the_configuration_is_what_the_profile_says(dynamic):
    made = parsed(trt, dynamic, strongly_typed=False)
    wanted = TensorRT(version="10.3", optimization_level=1, workspace_mb=256, version_compatible=True)
    config = configured(trt, made, wanted, ["REFIT"], None)
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 256_000_000
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert config.get_flag(trt.BuilderFlag.REFIT)
    assert not configured(trt, made, TensorRT(version="10.3"), [], None).get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def test_hardware_compatibility_that_is_not_to_be_had_is_told(dynamic):
    wanted = TensorRT(version="10.3", hardware_compatibility="ampere-plus")
    with pytest.raises(StageError, match="does not build for ampere-plus"):
        configured(trt, parsed(trt, dynamic, strongly_typed=False), wanted, [], None)


def compiled(file, tmp_path, batches=(1, 2, 8)):
    made = parsed(trt, file, strongly_typed=True)
    cache = tmp_path / "timing" / "gpu.timing"
    config = configured(trt, made, TensorRT(version="10.3"), [], cache)
    config.num_compute_capabilities = 1  # without a GPU the target must be named
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    with_profile(made, config, ranges(made.network, batches, file))
    return cache, serialized(trt, made, config, file, cache)


@pytest.mark.parametrize(("batch", "profiles"), [("batch", 1), (3, 0)])
def test_an_open_batch_gets_an_optimisation_profile_and_a_fixed_one_needs_none(tmp_path, batch, profiles):
    file = convolution(tmp_path / "model.onnx", batch)
    made = parsed(trt, file, strongly_typed=False)
    config = configured(trt, made, TensorRT(version="10.3"), [], None)
    with_profile(made, config, ranges(made.network, (1, 2, 8), file))
    assert config.num_optimization_profiles == profiles


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_engine_is_built_for_all_batches_and_what_was_timed_is_kept(dynamic, tmp_path):
    cache, engine = compiled(dynamic, tmp_path)
    assert len(engine) > 1000
    assert cache.is_file()
    _, again = compiled(dynamic, tmp_path)  # begins with the kept one
    assert len(again) == len(engine)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_that_does_not_compile_says_why(tmp_path):
    """A per-tensor scale of zero: the parser takes it, the builder does not."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dequantize"),
    ]
    constants = {"s": np.array(0.0, np.float32), "z": np.array(0, np.int8)}
    file = saved(tmp_path / "dead.onnx", nodes, value[:1], value[1:], constants)
    with pytest.raises(StageError, match=r"dead\.onnx") as error:
        compiled(file, tmp_path)
    assert "scale" in str(error.value).lower()
