"""The network of an artifact in PyTorch's own runtime, and measured through a profile that names it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd import models
from edgekd.artifact import Artifact, Manifest, ModelSpec, Preprocessing, finish, writing
from edgekd.bench import not_here
from edgekd.candidates import candidate_of
from edgekd.errors import ArtifactError
from edgekd.models import save_state
from edgekd.profile import Profile
from edgekd.runtimes import RuntimeStatus
from edgekd.scorecard import measure
from edgekd.stages.network import open_network
from edgekd.stages.teaching import load_network
from edgekd.tasks import Classification

PROTOCOL = {"rounds": 3, "block_s": 0.01, "warmup_s": 0.02, "cap_s": 1.0, "scenarios": ["single-stream"]}


def profile(**changes) -> Profile:
    table = {"name": "torch", "description": "", "runtime": "torch", "protocol": PROTOCOL}
    return Profile.model_validate({**table, **changes})


def written(directory, **changes) -> Artifact:
    """An artifact of a network that nothing trained."""
    torch.manual_seed(0)
    spec = ModelSpec(use="cifar-resnet", args={"depth": 8, "width": 4, "num_classes": 10, "in_channels": 1})
    with writing(directory) as temporary:
        save_state(models.build(spec), temporary / "model.safetensors")
        manifest = Manifest(
            kind="distill",
            key=directory.name,
            model=spec,
            preprocessing=Preprocessing(size=[1, 16, 16], mean=[0.3], std=[0.35]),
            classes=[f"digit {d}" for d in range(10)],
        )
        finish(temporary, manifest.model_copy(update=changes))
    return Artifact.open(directory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return written(tmp_path_factory.mktemp("artifacts") / "network")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_it_computes_what_the_network_of_the_artifact_computes(artifact, images, precision, tolerance):
    session = open_network(artifact, profile(precision=precision))
    found = session.run({"image": images.numpy()})["logits"]
    with torch.no_grad():
        expected = load_network(artifact).eval()(images).numpy()
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_a_quantized_artifact_holds_no_network_for_it(tmp_path):
    quantized = written(tmp_path / "quantized", kind="quantize", quantization={"scheme": "x86-u8s8"})
    with pytest.raises(ArtifactError, match="holds no float network"):
        open_network(quantized, profile())


@pytest.fixture(scope="module")
def measured(artifact, dataset, tmp_path_factory):
    candidates = [candidate_of(artifact, "network", dataset, 18, tmp_path_factory.mktemp("files"))]

    def of(made: Profile):
        results = measure(candidates, [made], data=dataset, task=Classification(), name="n", command="c", brief=True)
        return results.profiles[0]

    return of


def test_a_profile_that_says_torch_is_measured_in_torch(measured):
    found = measured(profile(precision="bf16"))
    assert found.runtime == f"torch {torch.__version__}"
    assert found.settings["precision"] == "bf16"
    assert found.elsewhere is None
    for variant in found.variants:
        assert variant.precision == "bf16"
        assert variant.latency.p50.value > 0
        assert variant.latency.parts == {}  # on the CPU all of a call is compute
        assert variant.peak_memory_mb is None  # that of a process with ONNX Runtime would be another's


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime-cuda"])
def test_a_gpus_profile_is_not_timed_where_there_is_none(measured, runtime):
    found = measured(profile(runtime=runtime, device="gpu"))
    assert found.elsewhere is not None
    assert all(variant.latency is None for variant in found.variants)
    assert all(variant.metrics["accuracy"] >= 0 for variant in found.variants)


@pytest.mark.parametrize(
    ("runtime", "device", "name"),
    [("torch", "gpu", "torch on CUDA"), ("onnxruntime-cuda", "gpu", "onnxruntime on CUDA"), ("torch", "cpu", None)],
)
def test_a_gpus_profile_wants_the_runtimes_build_with_cuda(runtime, device, name):
    machine = {"machine": "x86_64", "instruction_sets": [], "gpus": [{"name": "NVIDIA L4"}]}
    missing = [
        RuntimeStatus(name=n, available=False, why="a CPU-only build") for n in ("torch on CUDA", "onnxruntime on CUDA")
    ]
    why = not_here(profile(runtime=runtime, device=device), machine, lambda: missing)
    assert why == (f"torch runs on {name}, which does not run here: a CPU-only build" if name else None)
