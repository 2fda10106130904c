"""Where an NVIDIA GPU is at hand: PyTorch and ONNX Runtime on it, in every precision, with CUDA graphs and without.

    python benchmarks/gpu_runtimes.py --out benchmarks/results/gpu_runtimes.json

All variants of a network and a batch size are measured interleaved; compute, transfers and end to end are kept apart.
Before that, each one's outputs are compared with ONNX Runtime's on the CPU. Weights are random: they change no time.
Then it is probed whether TensorRT-RTX, and TensorRT itself, build and run an engine here. Exit 3 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgekd import models
from edgekd.artifact import ModelSpec, Preprocessing, TensorInfo, write_atomically
from edgekd.bench import environment, measure_latency
from edgekd.errors import EdgekdError
from edgekd.onnx_file import export_onnx
from edgekd.profile import Profile, Protocol
from edgekd.runtimes import Feed, Session, open_session
from edgekd.runtimes.cuda import need_cuda
from edgekd.runtimes.torch_session import TorchSession
from edgekd.trt.answers import agreement, outputs_of
from edgekd.trt.build import build_engines
from edgekd.trt.files import TrtFile
from edgekd.trt.half import in_half

SIZE, CLASSES, IMAGES = [3, 32, 32], 10, 64
NETWORKS = {
    "ResNet-20": ModelSpec(use="cifar-resnet", args={"depth": 20, "num_classes": CLASSES, "in_channels": 3}),
    "ResNet-56": ModelSpec(use="cifar-resnet", args={"depth": 56, "num_classes": CLASSES, "in_channels": 3}),
}
BATCHES = (1, 32)

#: Run in a process of its own: FILE -> one line of JSON. Compiled for the GPU that is there, whatever it is.
RTX = """
import json, sys
import numpy as np, onnxruntime, tensorrt_rtx_bindings as trt, torch
file = sys.argv[1]
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(file), parser.get_error(0).desc()
config = builder.create_builder_config()
profile = builder.create_optimization_profile()
shape = tuple(network.get_input(0).shape)[1:]
profile.set_shape(network.get_input(0).name, (1, *shape), (1, *shape), (32, *shape))
config.add_optimization_profile(profile)
data = builder.build_serialized_network(network, config)
assert data is not None, "no engine was built"
engine = trt.Runtime(logger).deserialize_cuda_engine(data)
assert engine is not None, "the engine does not load"
context = engine.create_execution_context()
image = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
expected = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]
x, y = torch.from_numpy(image).cuda(), torch.empty(expected.shape, device="cuda")
context.set_input_shape("image", tuple(x.shape))
context.set_tensor_address("image", x.data_ptr())
context.set_tensor_address("logits", y.data_ptr())
stream = torch.cuda.Stream()
assert context.execute_async_v3(stream.cuda_stream), "the engine does not run"
stream.synchronize()
difference = float(np.abs(y.cpu().numpy() - expected).max() / np.abs(expected).max())
print(json.dumps({"version": trt.__version__, "difference": difference}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cap-s", type=float, default=120.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        need_cuda("this benchmark")
    except EdgekdError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    protocol = Protocol(rounds=options.rounds, cap_s=options.cap_s)
    document: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "networks": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        for name, spec in NETWORKS.items():
            torch.manual_seed(0)
            network = models.build(spec).eval()
            files = files_of(network, Path(directory) / name)
            document["networks"][name] = measured(network, files, protocol)
        document["tensorrt-rtx"] = rtx_probed(files["fp32"])
        document["tensorrt"] = tensorrt_probed(files)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")


def files_of(network: torch.nn.Module, directory: Path) -> dict[str, Path]:
    """fp32 and fp16 ONNX files. ONNX Runtime has too few bf16 kernels for a file in it."""
    directory.mkdir()
    files = {kind: directory / f"model.{kind}.onnx" for kind in ("fp32", "fp16")}
    preprocessing = Preprocessing(size=SIZE, mean=[0.0] * 3, std=[1.0] * 3)
    names = [str(i) for i in range(CLASSES)]
    export_onnx(network, files["fp32"], size=SIZE, opset=18, classes=names, preprocessing=preprocessing)
    onnx.save(in_half(onnx.load(files["fp32"])), files["fp16"])
    return files


def measured(network: torch.nn.Module, files: dict[str, Path], protocol: Protocol) -> dict[str, Any]:
    """By batch size: outputs compared, and latencies of every variant that runs here; and why the others do not."""
    images = np.random.default_rng(0).standard_normal((IMAGES, *SIZE)).astype(np.float32)
    found: dict[str, Any] = {"refused": {}, "agreement": {}, "latency": {}}
    with contextlib.closing(open_session(files["fp32"])) as session:
        expected = outputs_of(session, {"image": images}, 32)
    for batch in BATCHES:
        sessions: dict[str, Session] = {}
        for name, (precision, opened) in variants(network, files).items():
            try:
                session = opened()
                near = agreement(outputs_of(session, {"image": images}, batch), expected, precision, name)
                session.bound(feed_of(session, images, batch))()
            except EdgekdError as error:
                found["refused"][name] = str(error)
                print(f"{name}: {error}", file=sys.stderr)
                continue
            sessions[name], found["agreement"][name] = session, vars(near)
        feeds = {name: feed_of(session, images, batch) for name, session in sessions.items()}
        latencies = measure_latency(sessions, feeds, protocol, threads=1).latencies
        found["latency"][str(batch)] = {name: latency.model_dump(mode="json") for name, latency in latencies.items()}
        for name, latency in latencies.items():
            parts = "  ".join(f"{part} {value.value:.4f}" for part, value in latency.parts.items())
            print(f"batch {batch:3}  {name:36} end to end {latency.p50.value:.4f} ms  {parts}")
        for session in sessions.values():
            session.close()
    return found


def variants(network: torch.nn.Module, files: dict[str, Path]) -> dict[str, Any]:
    """name -> precision, and what opens it. The first is what ratios stand on."""
    found: dict[str, Any] = {}
    inputs = [TensorInfo(name="image", dtype="float32", axes=["batch", *SIZE])]
    outputs = [TensorInfo(name="logits", dtype="float32", axes=["batch", CLASSES])]
    for graphs in (False, True):
        launched = "with graphs" if graphs else "without graphs"
        for precision in ("fp32", "fp16", "bf16"):
            found[f"torch {precision} {launched}"] = precision, lambda precision=precision, graphs=graphs: TorchSession(
                copy.deepcopy(network), inputs, outputs, "network", device="cuda", precision=precision,
                cuda_graphs=graphs,
            )  # fmt: skip
        for precision, file in files.items():
            found[f"onnxruntime {precision} {launched}"] = (
                precision,
                lambda file=file, graphs=graphs: open_session(
                    file, runtime="onnxruntime-cuda", options={"cuda_graphs": graphs}
                ),
            )
    return found


def feed_of(session: Session, images: np.ndarray, batch: int) -> Feed:
    return {info.name: images[:batch].astype(info.dtype) for info in session.inputs}


def rtx_probed(file: Path) -> dict[str, Any]:
    """Whether TensorRT-RTX, whose list of GPUs is short, runs what it builds on this one."""
    try:
        child = subprocess.run([sys.executable, "-c", RTX, str(file)], capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return {"runs": False, "why": "it did not end within 600 s"}
    lines = (child.stdout if child.returncode == 0 else child.stderr).strip().splitlines()
    if child.returncode or not lines:
        return {"runs": False, "why": lines[-1] if lines else f"status {child.returncode}"}
    answer = json.loads(lines[-1])
    return {"runs": answer["difference"] < 0.01, **answer}


def tensorrt_probed(files: dict[str, Path]) -> dict[str, Any]:
    """Engines of fp32 and fp16 by TensorRT itself, compared with ONNX Runtime, or why there are none."""
    images = np.random.default_rng(0).standard_normal((IMAGES, *SIZE)).astype(np.float32)
    try:
        import tensorrt

        version = ".".join(tensorrt.__version__.split(".")[:2])
    except Exception as error:  # somebody else's import
        return {"runs": False, "why": f"{type(error).__name__}: {error}"}
    table = {
        "name": "here",
        "description": "",
        "device": "gpu",
        "runtime": "tensorrt",
        "tensorrt": {"version": version},
    }
    made = [TrtFile(kind, file, 18, kind == "fp16", {}) for kind, file in files.items()]
    try:
        engines = build_engines(made, Profile.model_validate(table), files["fp32"].parent, {"image": images})
    except EdgekdError as error:
        return {"runs": False, "why": str(error)}
    return {"runs": True, "engines": {e.name: {**e.metadata.model_dump(), **vars(e.agreement)} for e in engines}}


if __name__ == "__main__":
    main()
