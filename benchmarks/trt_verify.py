"""What TensorRT-RTX makes of edgekd's files: nodes that it refuses, and matrix layers that are int8, without a GPU.

    python benchmarks/trt_verify.py --data data --resnet20 data/resnet20.th --resnet56 data/resnet56.th \\
        --into docs/tensorrt.md

Four networks, as they are and with half of their MACs pruned away, each float and quantized by the scheme trt-s8s8,
in every form that `edgekd export` has for TensorRT. Weights are random where none are given: which kernel a layer gets
depends on the graph. Pruned networks are not healed and accuracy is not looked at here. Seconds are those of parsing
and building, and say nothing of how fast the engine is. A run of some networks keeps the rows of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rows import NORMALIZE
from torch import Tensor, nn

from edgekd import quant
from edgekd.artifact import ModelSpec, Preprocessing, write_atomically
from edgekd.bench import environment
from edgekd.data.cifar import cifar10
from edgekd.models import Tapped, build
from edgekd.models.weights import load_weights
from edgekd.onnx_file import export_onnx, read
from edgekd.profile import load_profile
from edgekd.pruning import Target, prune
from edgekd.trt import Verification, verify, write_files

SIZE = [3, 32, 32]
PLAIN = Preprocessing(size=SIZE, **NORMALIZE)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet-20": ("cifar-resnet", {"depth": 20}),
    "ResNet-56": ("cifar-resnet", {"depth": 56}),
    "mobile": ("mobilenet", {}),
    "ViT": ("vit", {}),
}
#: A device whose TensorRT may choose types, and one whose TensorRT takes them from the file.
WEAK, STRONG = load_profile("jetson-orin-nano-8gb"), load_profile("gpu-l4")
CAPABILITY = "8.6"
FILES = ["int8", "int8-fp16", "fp16", "fp32"]


def images_of(data: Path | None) -> Tensor:
    """Normalised images [64, 3, 32, 32]: of CIFAR-10, or noise."""
    if data is None:
        return torch.randn(64, *SIZE)
    mean, std = (torch.tensor(NORMALIZE[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (cifar10(data).train.images[:64].float() / 255 - mean) / std


def network_of(name: str, weights: Path | None) -> nn.Module:
    kind, arguments = NETWORKS[name]
    network = build(ModelSpec(use=kind, args={**arguments, "num_classes": 10, "in_channels": 3})).eval()
    if weights is not None:
        load_weights(network, weights)
    return network


def states(name: str, weights: Path | None, images: Tensor) -> Iterator[tuple[str, nn.Module]]:
    for pruned in (False, True):
        network = network_of(name, weights)
        if pruned:
            prune(
                network,
                images[:1],
                target=Target(macs=0.5),
                importance="magnitude",
                channel_multiple=8,
                batches=[{"image": images}],
                strategy="uniform",
            )
        before = "pruned, " if pruned else ""
        yield f"{before}float", network
        prepared = quant.prepare(Tapped(network), images, quant.scheme_named("trt-s8s8", "here"), qat=False)
        quant.calibrate(prepared, [images])
        quant.enable_fake_quant(prepared)
        yield f"{before}int8", quant.convert(prepared)


def row_of(name: str, state: str, file: str, trained: bool, found: Verification) -> dict[str, Any]:
    return {
        "network": name,
        "weights": "trained" if trained else "random",
        "state": state,
        "file": file,
        "compiler": found.compiler,
        "compiled": found.compiled,
        "why": found.why,
        "refused": [r.node for r in found.refused],
        "findings": dict(Counter(f"{f.severity}: {f.rule}" for f in found.findings)),
        "layers": len(found.layers),
        "wanted": found.wanted,
        "got": found.got,
        "silently_float": [layer.name for layer in found.silently_float],
        "not_quantized": [x.name for x in found.layers if x.wanted != "int8"] if file.startswith("int8") else [],
        "ok": found.ok,
        "seconds": found.seconds,
    }


def rows(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    images = images_of(options.data)
    classes = [str(i) for i in range(10)]
    weights = {"ResNet-20": options.resnet20, "ResNet-56": options.resnet56}.get(name)
    for state, network in states(name, weights, images):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            export_onnx(network, path, size=SIZE, opset=18, classes=classes, preprocessing=PLAIN)
            for written in write_files(read(path), Path(scratch), [WEAK, STRONG], images.numpy()):
                profile = STRONG if written.name == "int8-fp16" else WEAK
                found = verify(written.path, profile, compute_capability=CAPABILITY)
                yield row_of(name, state, written.name, weights is not None, found)
                print(name, state, written.name, found.wanted, found.got, found.why or "", flush=True)


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [f"| network | | {' | '.join(f'`{name}`' for name in FILES)} |", "|---|---|" + "---:|" * len(FILES)]
    cells = {(r["network"], r["state"], r["file"]): _cell(r) for r in found}
    for network, state in dict.fromkeys((n, s) for n, s, _ in cells):
        row = [cells.get((network, state, name), "–") for name in FILES]
        lines.append(f"| {network} | {state} | {' | '.join(row)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if not row["compiled"]:
        return f"refused: {row['why']}"
    wanted = row["wanted"].get("int8")
    int8 = [f"{row['got'].get('int8', 0)} of {wanted} int8"] if wanted else []
    others = [f"{count} {precision}" for precision, count in row["got"].items() if precision != "int8"]
    return ", ".join([*int8, *others])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="holds cifar-10-batches-bin; default: noise")
    parser.add_argument("--resnet20", type=Path, help="trained weights")
    parser.add_argument("--resnet56", type=Path, help="trained weights")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--into", type=Path, help="the page that has the table between its markers")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trt_verify.json"))
    options = parser.parse_args()
    found: dict[str, Any] = (
        json.loads(options.out.read_text()) if options.out.is_file() else {"rows": [], "commands": {}}
    )
    for name in options.networks:
        torch.manual_seed(0)
        kept = [row for row in found["rows"] if row["network"] != name]
        found = {
            "commands": {**found["commands"], name: " ".join(["python", *sys.argv])},
            "environment": environment(),
            "compute_capability": CAPABILITY,
            "profiles": {file: (STRONG if file == "int8-fp16" else WEAK).name for file in FILES},
            "targets": {"refused": 0, "silently_float": 0},
            "rows": [*kept, *rows(name, options)],
        }
        found["rows"].sort(key=lambda row: list(NETWORKS).index(row["network"]))
        write_atomically(options.out, json.dumps(found, indent=1) + "\n")
    print(text := table(found["rows"]))
    if options.into is not None:
        page, begin, end = options.into.read_text(), "<!-- table:verify -->", "<!-- /table:verify -->"
        options.into.write_text(f"{page.partition(begin)[0]}{begin}\n{text}\n{end}{page.partition(end)[2]}")


if __name__ == "__main__":
    main()
