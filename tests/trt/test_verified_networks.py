"""edgekd's own networks, pruned and quantized, in every form for TensorRT: taken, and int8 where the scheme says so."""

from __future__ import annotations

import pytest
import torch

from edgekd import quant
from edgekd.artifact import ModelSpec, Preprocessing
from edgekd.models import Tapped, build
from edgekd.onnx_file import export_onnx, read
from edgekd.profile import load_profile
from edgekd.pruning import Target, prune
from edgekd.trt import verify, write_files

pytest.importorskip("tensorrt_rtx_bindings")

SIZE = [3, 16, 16]
#: A TensorRT that may choose types, and one that takes them from the file.
WEAK, STRONG = load_profile("jetson-orin-nano-8gb"), load_profile("gpu-l4")
#: use -> arguments, and how many products of calculated factors there are, which the scheme leaves float.
NETWORKS = {
    "mobilenet": ({"width": 0.25}, 0),
    "vit": ({"dim": 32, "depth": 2, "heads": 2, "image_size": 16}, 4),
}


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def written(request, tmp_path_factory):
    """The network's name, its layers with weights, and its files by name."""
    torch.manual_seed(0)
    args, _ = NETWORKS[request.param]
    images = torch.randn(32, *SIZE)
    network = build(ModelSpec(use=request.param, args={**args, "num_classes": 10, "in_channels": 3})).eval()
    options = {"importance": "magnitude", "channel_multiple": 2, "strategy": "uniform"}
    prune(network, images[:1], target=Target(macs=0.7), batches=[{"image": images[:8]}], **options)
    layers = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    prepared = quant.prepare(Tapped(network), images, quant.scheme_named("trt-s8s8", "test"), qat=False)
    quant.calibrate(prepared, [images])
    quant.enable_fake_quant(prepared)
    directory = tmp_path_factory.mktemp("files")
    seen = Preprocessing(size=SIZE, mean=[0.5] * 3, std=[0.25] * 3)
    classes = [str(i) for i in range(10)]
    file = directory / "model.onnx"
    export_onnx(quant.convert(prepared), file, size=SIZE, opset=18, classes=classes, preprocessing=seen)
    files = write_files(read(file), directory, [WEAK, STRONG], images.numpy())
    return request.param, layers, {f.name: f.path for f in files}


@pytest.mark.parametrize(("form", "profile", "rest"), [("int8", WEAK, "fp32"), ("int8-fp16", STRONG, "fp16")])
def test_every_layer_with_a_weight_is_int8(written, form, profile, rest):
    name, layers, files = written
    found = verify(files[form], profile)
    assert found.refused == []
    assert found.ok, found.findings
    assert sorted(x.path for x in found.layers if x.got == "int8") == sorted(layers)
    calculated = NETWORKS[name][1]
    assert sum("both factors are calculated" in (layer.why or "") for layer in found.layers) == calculated
    assert found.got == {"int8": len(layers), **({rest: calculated} if calculated else {})}


@pytest.mark.parametrize("form", ["fp16", "fp32"])
def test_the_float_siblings_are_taken_as_they_are(written, form):
    name, layers, files = written
    found = verify(files[form], WEAK)
    assert found.ok, found.findings
    assert found.refused == []
    assert found.got == {form: len(layers) + NETWORKS[name][1]}
