"""int8 against fp32 of the same CIFAR ResNets in ONNX Runtime: fused layers and latency ratio, interleaved.

    python benchmarks/quantized_graph.py --out benchmarks/results/quantized_graph.json

Post-training quantization of networks with random weights: latency and fusion depend on the graph, not on what it
learned. Quality is measured where networks are trained (benchmarks/cifar10_edge.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd import quant
from edgekd.artifact import ModelSpec, Preprocessing, write_atomically
from edgekd.bench import environment, measure_latency, speedup
from edgekd.models import Tapped, build
from edgekd.onnx_file import export_onnx, optimised_layers
from edgekd.profile import load_profile
from edgekd.runtimes import open_session

PLAIN = Preprocessing(size=[3, 32, 32], mean=[0.5] * 3, std=[0.25] * 3)


def write(network: torch.nn.Module, path: Path) -> Path:
    classes = [str(i) for i in range(10)]
    export_onnx(network, path, size=[3, 32, 32], opset=18, classes=classes, preprocessing=PLAIN)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--profile", default="cpu-x86")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    profile = load_profile(options.profile)
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for depth in options.depths:
            args = {"depth": depth, "num_classes": 10, "in_channels": 3}
            network = build(ModelSpec(use="cifar-resnet", args=args)).eval()
            files[f"resnet-{depth} fp32"] = write(network, Path(scratch) / f"{depth}-fp32.onnx")
            scheme = quant.scheme_named(profile.scheme, "profile")
            prepared = quant.prepare(Tapped(network), images, scheme, qat=False)
            quant.calibrate(prepared, [images])
            quant.enable_fake_quant(prepared)
            files[f"resnet-{depth} int8"] = write(quant.convert(prepared), Path(scratch) / f"{depth}-int8.onnx")
        sessions = {n: open_session(f, runtime=profile.runtime, threads=profile.threads) for n, f in files.items()}
        feed = {"image": np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)}
        latencies, _ = measure_latency(sessions, dict.fromkeys(sessions, feed), profile.protocol, profile.threads)
        rows: list[dict[str, Any]] = []
        for depth in options.depths:
            fp32, int8 = f"resnet-{depth} fp32", f"resnet-{depth} int8"
            ratio = speedup(latencies[fp32], latencies[int8])
            rows.append(
                {
                    "network": f"resnet-{depth}",
                    "fp32_p50_ms": round(latencies[fp32].p50.value, 4),
                    "int8_p50_ms": round(latencies[int8].p50.value, 4),
                    "int8_faster_by": round(ratio.value, 3),
                    "interval": [round(ratio.low, 3), round(ratio.high, 3)],
                    "layers_int8_file": optimised_layers(files[int8]),
                    "bytes": {"fp32": files[fp32].stat().st_size, "int8": files[int8].stat().st_size},
                }
            )
            print(rows[-1], flush=True)
    document = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "protocol": profile.protocol.model_dump(mode="json"),
        "rows": rows,
        "targets": {"float layers": 0, "resnet-20 int8 faster by": 1.9},
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
