"""Which files a profile gets, in which opset, and that a file which computes something else is not handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_files import digits, outputs, small_file

from edgekd.errors import StageError
from edgekd.onnx_edit import opset_of
from edgekd.profile import Profile, load_profile
from edgekd.trt import files, verify, write_files


def profile(version: str, **changes: Any) -> Profile:
    jetson = load_profile("jetson-orin-nano-8gb")
    assert jetson.tensorrt is not None
    return jetson.model_copy(update={"tensorrt": jetson.tensorrt.model_copy(update={"version": version, **changes})})


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([], {"int8-fp16": (19, True), "fp16": (18, True), "fp32": (18, True)}),
        (["8.6"], {"int8": (17, False), "fp16": (17, False), "fp32": (17, False)}),
        (["10.3"], {"int8": (17, False), "fp16": (17, True), "fp32": (17, True)}),
        (["11.4"], {"int8-fp16": (19, True), "fp16": (18, True), "fp32": (18, True)}),
    ],
)
def test_the_form_of_the_files_follows_the_builder(
    tmp_path: Path, versions: list[str], expected: dict[str, tuple[int, bool]]
) -> None:
    made = write_files(small_file(True), tmp_path, [profile(v) for v in versions], digits())
    assert {file.name: (file.opset, file.strongly_typed) for file in made} == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"model.{name}.onnx" for name in expected)
    for file in made:
        model = onnx.load(file.path)
        onnx.checker.check_model(model, full_check=True)
        assert opset_of(model) == file.opset
        kinds = {node.op_type for node in model.graph.node}
        assert ("QuantizeLinear" in kinds) == ("int8" in file.name)
        assert (onnx.TensorProto.FLOAT16 in {t.data_type for t in model.graph.initializer}) == ("fp16" in file.name)


def test_older_and_newer_builders_together_get_both_forms(tmp_path: Path) -> None:
    made = {f.name for f in write_files(small_file(True), tmp_path, [profile("10.3"), profile("11.4")], digits())}
    assert made == {"int8", "int8-fp16", "fp16", "fp32"}


def test_a_dla_gets_no_integers_and_a_gpu_beside_it_does(tmp_path: Path) -> None:
    dla = profile("10.3", dla=0, dla_cores=2)
    assert [file.name for file in write_files(small_file(True), tmp_path, [dla], digits())] == ["fp16", "fp32"]
    both = [file.name for file in write_files(small_file(True), tmp_path, [dla, profile("10.3")], digits())]
    assert both == ["int8", "fp16", "fp32"]


def test_a_float_network_gets_no_integers(tmp_path: Path) -> None:
    made = write_files(small_file(False), tmp_path, [profile("10.3"), load_profile("cpu-x86")], digits())
    assert [file.name for file in made] == ["fp16", "fp32"]
    assert made[1].compared["max_abs_difference"] == 0


@pytest.mark.parametrize("batch", [1, "batch"])
def test_what_is_recorded_is_what_the_files_compute(tmp_path: Path, batch: Any) -> None:
    model, images = small_file(True, batch=batch), digits(40)
    single = [images[i : i + 1] for i in range(40)] if batch == 1 else [images]
    made = {f.name: f for f in write_files(model, tmp_path, [profile("10.3")], images)}
    logits = {n: np.concatenate([outputs(onnx.load(f.path), x) for x in single]) for n, f in made.items()}
    logits["model"] = np.concatenate([outputs(model, x) for x in single])
    for name, reference in (("int8", "model"), ("fp16", "fp32"), ("fp32", "model")):
        compared = made[name].compared
        assert (compared["with"], compared["images"]) == (reference, 40)
        expected = np.abs(logits[name] - logits[reference]).max()
        assert compared["max_abs_difference"] == pytest.approx(expected, abs=1e-6)
        agreement = (logits[name].argmax(1) == logits[reference].argmax(1)).mean()
        assert compared["argmax_agreement"] == pytest.approx(agreement)
    assert made["int8"].compared["max_abs_difference"] == 0 < made["fp32"].compared["max_abs_difference"]


def grown(factor: float) -> onnx.ModelProto:
    """The float file with a product by `factor` behind conv2, and one by its reciprocal behind that."""
    model = small_file(False)
    for name, value in (("large", factor), ("small", 1 / factor)):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    index = next(i for i, n in enumerate(model.graph.node) if n.name == "conv2")
    model.graph.node[index].output[0] = "before"
    model.graph.node.insert(index + 1, helper.make_node("Mul", ["before", "large"], ["middle"], name="grows"))
    model.graph.node.insert(index + 2, helper.make_node("Mul", ["middle", "small"], ["conv2_out"], name="shrinks"))
    return model


def test_a_value_that_only_appears_on_real_images_and_passes_float16_is_named(tmp_path: Path) -> None:
    """ONNX Runtime calculates float16 products in float32 on a CPU: outputs alone would not tell."""
    assert [f.name for f in write_files(grown(1000), tmp_path, [], digits())] == ["fp16", "fp32"]
    with pytest.raises(StageError, match=r"grows: middle reaches .* on real images, beyond float16's 65504"):
        write_files(grown(60000), tmp_path, [], digits())


def test_a_file_that_computes_something_else_is_not_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files.in_half

    def without_skip(model: onnx.ModelProto) -> onnx.ModelProto:
        made = whole(model)
        add = next(n for n in made.graph.node if n.op_type == "Add")
        add.input[1] = add.input[0]
        return made

    monkeypatch.setattr(files, "in_half", without_skip)
    with pytest.raises(StageError, match=r"model.fp16.onnx: model.fp16.onnx does not compute what it was made from"):
        write_files(small_file(False), tmp_path, [], digits())


def test_the_compiler_runs_every_layer_in_the_type_that_the_file_gives_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    wanted = {"int8-fp16": "int8", "fp16": "fp16"}
    for file in write_files(small_file(True), tmp_path, [], digits()):
        if file.name in wanted:
            found = verify(file.path, profile("11.4"))
            assert (found.origin, found.ok) == ("compiled", True), found.why
            assert found.got == {wanted[file.name]: 3}
