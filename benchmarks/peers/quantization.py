"""edgekd's int8 beside ONNX Runtime, NNCF, torchao, Neural Compressor and nvidia-modelopt: the same float networks, the
same calibration images, everything measured as files in ONNX Runtime.

    python -m venv .venv-peers
    .venv-peers/bin/python -m pip install -c constraints.txt torch==2.13.0
    .venv-peers/bin/python -m pip install -c constraints.txt -r benchmarks/peers/quantization-requirements.txt
    python benchmarks/peers/quantization.py --peers .venv-peers/bin/python --data data \\
        --resnet20 data/resnet20.th --resnet56 data/resnet56.th --scratch DIR \\
        --out benchmarks/results/peers_quantization.json

This script runs in edgekd's environment. Each tool runs as a process of the other one (quantization_tools.py) and
writes an ONNX file; accuracy on the 10,000 test images and latency are taken from the files here, latency of all of a
network's files interleaved in one session, one thread. What is there is not done again: the same command goes on after
an interruption. A tool that fails gets a row with its error.

The two ResNets are trained ones, given as files; the mobile network and the ViT are trained here first (`--epochs`).
Calibration images are drawn by the seed; with several seeds, accuracy has a spread. Seconds are a tool's own time, from
float network to file, without imports; edgekd's with everything that its stages do, healing included. Lines are those
that a user writes for it: of a function in quantization_tools.py, or of stages in a recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.artifact import Artifact, write_atomically
from edgekd.bench import environment, evaluate, measure_latency, side_by_side, speedup
from edgekd.bench.side_by_side import noise
from edgekd.data import Dataset, batches, load
from edgekd.onnx_file import optimised_layers
from edgekd.pipeline import Plan, plan, run_steps
from edgekd.profile import load_profile
from edgekd.recipe import parse_recipe
from edgekd.runtimes import open_session
from edgekd.stages.export import write_onnx

HERE = Path(__file__).parent
NORMALIZE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MODELS: dict[str, dict[str, Any]] = {
    "resnet20": {"use": "cifar-resnet", "depth": 20},
    "resnet56": {"use": "cifar-resnet", "depth": 56},
    "mobile": {"use": "mobilenet"},
    "vit": {"use": "vit"},
}
TRAINING: dict[str, dict[str, Any]] = {
    "mobile": {"optimizer": "sgd", "lr": 0.3},
    "vit": {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.05},
}
PEERS = ["onnxruntime-static", "nncf", "torchao-x86", "neural-compressor", "modelopt"]
TRANSFORMER = ["edgekd-dynamic", "onnxruntime-products", "onnxruntime-dynamic", "nncf-transformer"]
#: The stages of a recipe, as a user writes them.
RECIPES = {
    "edgekd-ptq": """
[[stage]]
use = "quantize"
heal = { epochs = 0 }
[[stage]]
use = "export"
""",
    "edgekd-ptq-mixed": """
[[stage]]
use = "quantize"
mixed = "latency"
heal = { epochs = 0 }
[[stage]]
use = "export"
""",
    "edgekd-qat": """
[[stage]]
use = "quantize"
heal = { epochs = 1, lr = 0.01 }
[[stage]]
use = "export"
""",
    "edgekd-qat-mixed": """
[[stage]]
use = "quantize"
mixed = "latency"
heal = { epochs = 1, lr = 0.01 }
[[stage]]
use = "export"
""",
    "edgekd-dynamic": """
[[stage]]
use = "quantize"
backend = "onnxruntime"
mode = "dynamic"
heal = { epochs = 0 }
[[stage]]
use = "export"
""",
}
CALIBRATION = 512


def tools_of(network: str) -> list[str]:
    every = [tool for tool in RECIPES if tool not in TRANSFORMER]
    own = every if network in TRAINING else ["edgekd-ptq", "edgekd-qat"]
    return own + PEERS + (TRANSFORMER if network == "vit" else [])


def recipe(options: argparse.Namespace, network: str, seed: int, teacher: dict[str, Any], stages: str = "") -> Any:
    import tomllib

    data = {"use": "cifar10", "root": str(options.data), "batch": 128, "augment": "crop-flip", "validation": 0.0}
    table = {"version": 1, "name": network, "seed": seed, "data": {**data, "normalize": NORMALIZE}}
    table |= {"profiles": [options.profile], "teacher": {"model": MODELS[network], **teacher}, **tomllib.loads(stages)}
    return parse_recipe(table, [])


def progress(event: dict[str, Any]) -> None:
    if event["event"] in ("stage", "epoch"):
        print("   ", {k: v for k, v in event.items() if k in ("stage", "epoch", "accuracy", "loss")}, flush=True)


def float_network(options: argparse.Namespace, network: str, data: Dataset) -> Path:
    """A directory with a float network's spec, weights and ONNX file; trained here where no file of it is given."""
    directory = options.scratch / network
    if (directory / "float.onnx").exists():
        return directory
    weights = getattr(options, network, None)
    teacher = {"weights": str(weights)} if weights else {"epochs": options.epochs, **TRAINING[network]}
    planned = plan(recipe(options, network, 0, teacher), directory / "float", data=data)
    run_steps(planned, progress)
    artifact: Artifact = planned.artifact("teacher")
    (directory / "spec.json").write_text(artifact.manifest.model.model_dump_json())
    shutil.copyfile(artifact.file("model.safetensors"), directory / "model.safetensors")
    write_onnx(artifact, directory / "exported.onnx", data, opset=18)
    (directory / "exported.onnx").replace(directory / "float.onnx")
    return directory


def calibration(directory: Path, data: Dataset, seed: int) -> Path:
    """What every tool calibrates with: the images that edgekd's own stage draws."""
    place = directory / f"seed{seed}"
    if not (place / "images.npy").exists():
        place.mkdir(exist_ok=True)
        stream = batches(data.train, batch=64, mean=data.mean, std=data.std, seed=seed, epoch=0)
        drawn = [batch["image"].numpy() for batch, _ in zip(stream, range(CALIBRATION // 64), strict=False)]
        np.save(place / "images.npy", np.concatenate(drawn))
        for name in ("spec.json", "model.safetensors", "float.onnx"):
            shutil.copyfile(directory / name, place / name)
    return place


def by_edgekd(
    options: argparse.Namespace, network: str, tool: str, seed: int, place: Path, file: Path, data: Dataset
) -> dict[str, Any]:
    stages = RECIPES[tool]
    wanted = recipe(options, network, seed, {"weights": str(place / "model.safetensors")}, stages)
    planned: Plan = plan(wanted, place / tool, data=data)
    run_steps(planned, progress, until="teacher")
    began = time.monotonic()
    artifact = run_steps(planned, progress)[-1]
    seconds = round(time.monotonic() - began, 2)
    shutil.copyfile(artifact.file("model.onnx"), file)
    return {"seconds": seconds, "lines": sum(1 for line in stages.splitlines() if line.strip())}


def by_peer(options: argparse.Namespace, tool: str, place: Path, file: Path) -> dict[str, Any]:
    command = [str(options.peers), str(HERE / "quantization_tools.py"), tool, str(place), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    file.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode != 0 or not file.exists():
        last = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(last[-1] if last else f"ended with status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def quantized(
    options: argparse.Namespace, network: str, tool: str, seed: int, directory: Path, data: Dataset
) -> dict[str, Any]:
    """One row: made if it is not there, with what went wrong if it fails."""
    place = calibration(directory, data, seed)
    row_file, file = place / f"{tool}.json", place / f"{tool}.onnx"
    if row_file.exists():
        return json.loads(row_file.read_text())
    row: dict[str, Any] = {"network": network, "tool": tool, "seed": seed, "test_images": options.test_images}
    print(f"{network} {tool} seed {seed}", flush=True)
    try:
        if tool in RECIPES:
            row |= by_edgekd(options, network, tool, seed, place, file, data)
        else:
            row |= by_peer(options, tool, place, file)
        row |= judged(file, data, options.test_images)
    except Exception as error:  # a tool of somebody else may fail in any way, and the table goes on
        row["error"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    print("   ", row, flush=True)
    write_atomically(row_file, json.dumps(row) + "\n")
    return row


def judged(file: Path, data: Dataset, images: int) -> dict[str, Any]:
    """Accuracy on the first `images` test images, matrix layers and bytes of a file."""
    mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in (data.mean, data.std))
    with contextlib.closing(open_session(file, threads=os.cpu_count() or 1)) as session:
        raw, labels = data.test.images[:images].numpy(), data.test.labels[:images].numpy()
        logits = evaluate(session, raw, lambda x: (x.astype(np.float32) / 255 - mean) / std)
    right = float((logits.argmax(1) == labels).mean())
    return {"accuracy": right, "layers": optimised_layers(file), "bytes": file.stat().st_size}


def latencies(options: argparse.Namespace, network: str, files: dict[str, Path], directory: Path) -> dict[str, Any]:
    """Of a network's files, the float one first: interleaved, once for these very files."""
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
    stored = directory / "latency.json"
    if stored.exists() and (found := json.loads(stored.read_text()))["files"] == digests:
        return found
    print(f"{network}: latency of {len(files)} files", flush=True)
    profile = load_profile(options.profile)
    if options.quick:
        measured, _ = vars(side_by_side(files, profile, rounds=3, cap_s=10)).values()
    else:
        sessions = {n: open_session(f, runtime=profile.runtime, threads=profile.threads) for n, f in files.items()}
        feeds = {name: noise(session, 1) for name, session in sessions.items()}
        protocol = profile.protocol.model_copy(update={"cap_s": 240.0})
        measured, _ = vars(measure_latency(sessions, feeds, protocol, profile.threads)).values()
    rows = {}
    for name, latency in measured.items():
        ratio = speedup(measured["float"], latency)
        interval = [round(ratio.low, 3), round(ratio.high, 3)]
        rows[name] = {"p50_ms": round(latency.p50.value, 4), "faster_by": round(ratio.value, 3), "interval": interval}
    found = {"files": digests, "rows": rows, "quick": options.quick, "environment": environment()}
    write_atomically(stored, json.dumps(found) + "\n")
    return found


def summary(rows: Sequence[dict[str, Any]], latency: dict[str, Any]) -> dict[str, Any]:
    """A tool's seeds as one row."""
    good = [row for row in rows if "error" not in row]
    row: dict[str, Any] = {key: rows[0][key] for key in ("network", "tool", "test_images")}
    row["seeds"] = [r["seed"] for r in rows]
    if not good:
        return {**row, "error": rows[0]["error"]}
    accuracies = [r["accuracy"] for r in good]
    row |= {"accuracy": round(statistics.mean(accuracies), 5), "accuracies": [round(a, 5) for a in accuracies]}
    row |= {"spread": round(max(accuracies) - min(accuracies), 5), "seconds": [r["seconds"] for r in good]}
    row |= {"lines": good[0]["lines"], "layers": good[0]["layers"], "bytes": good[0]["bytes"]}
    return {**row, **latency["rows"].get(rows[0]["tool"], {})}


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| network | tool | accuracy | spread | x float | layers int8 / float | kB | s | lines |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['network']} | {row['tool']} | {row['error'][:70]} |" + " |" * 6)
            continue
        ratio = f"{row['faster_by']:.2f} {row['interval']}" if "faster_by" in row else "-"
        layers = f"{row['layers']['int8']} / {row['layers']['float']}"
        seconds = f"{statistics.median(row['seconds']):.0f}" if row.get("seconds") else "-"
        figures = [f"{row['accuracy']:.2%}", f"{row.get('spread', 0) * 100:.2f}", ratio, layers]
        figures += [f"{row['bytes'] / 1e3:.0f}", seconds, str(row.get("lines", "-"))]
        lines.append(f"| {row['network']} | {row['tool']} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def versions(peers: Path) -> dict[str, str]:
    names = ["torch", "torchao", "onnx", "onnxruntime", "onnxscript", "nncf", "neural-compressor", "nvidia-modelopt"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return json.loads(subprocess.run([str(peers), "-c", code], capture_output=True, text=True, check=True).stdout)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="Python of the environment with the tools")
    parser.add_argument("--data", type=Path, default=Path("data"), help="directory with cifar-10-batches-bin")
    parser.add_argument("--resnet20", type=Path, help="trained weights of a CIFAR ResNet-20")
    parser.add_argument("--resnet56", type=Path, help="trained weights of a CIFAR ResNet-56")
    parser.add_argument("--scratch", type=Path, required=True, help="where files and finished rows are kept")
    parser.add_argument("--networks", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tools", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--qat-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=12, help="of the mobile network and the ViT")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one tool on one network")
    parser.add_argument("--profile", default="cpu-x86")
    parser.add_argument("--quick", action="store_true", help="few rounds and few images: shows that it runs")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def table_of(options: argparse.Namespace, network: str, data: Dataset) -> list[dict[str, Any]]:
    directory = float_network(options, network, data)
    rows: dict[str, list[dict[str, Any]]] = {}
    for tool in options.tools or tools_of(network):
        seeds = options.qat_seeds if "qat" in tool else options.seeds
        rows[tool] = [quantized(options, network, tool, seed, directory, data) for seed in seeds]
    files = {"float": directory / "float.onnx"}
    for tool, made in rows.items():
        good = next((row for row in made if "error" not in row), None)
        if good is not None:
            files[tool] = directory / f"seed{good['seed']}" / f"{tool}.onnx"
    latency = latencies(options, network, files, directory)
    plain = {"network": network, "tool": "float", "test_images": options.test_images}
    plain |= {**judged(files["float"], data, options.test_images), **latency["rows"]["float"]}
    return [plain, *(summary(made, latency) for made in rows.values())]


def main() -> None:
    options = parsed()
    for network in ("resnet20", "resnet56"):
        if network in options.networks and getattr(options, network) is None:
            sys.exit(f"--{network} FILE is wanted for {network}, or leave it out with --networks")
    if options.quick:
        options.test_images, options.epochs = min(500, options.test_images), 1
        options.scratch /= "quick"
    options.scratch.mkdir(parents=True, exist_ok=True)
    wanted = recipe(options, options.networks[0], 0, {"epochs": 1})
    data = load(wanted.data, 0)
    if options.quick:
        data = dataclasses.replace(data, train=data.train.take(torch.arange(5000)))
    rows: list[dict[str, Any]] = []
    for network in options.networks:
        rows += table_of(options, network, data)
        document = {
            "command": " ".join(["python", *sys.argv]),
            "environment": environment(),
            "peers": versions(options.peers),
            "protocol": load_profile(options.profile).protocol.model_dump(mode="json"),
            "calibration_images": CALIBRATION,
            "training_epochs": dict.fromkeys(TRAINING, options.epochs),
            "quick": options.quick,
            "rows": rows,
        }
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    print(shown(rows))


if __name__ == "__main__":
    main()
