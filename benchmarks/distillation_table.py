"""Every objective and teacher source on CIFAR-10, the same budget for all: a table that resumes where it was killed.

    python benchmarks/distillation_table.py screen --out benchmarks/results/distillation_screen.json
    python benchmarks/distillation_table.py final --methods dist dkd --out benchmarks/results/distillation_table.json
    python benchmarks/distillation_table.py tables --into docs/distillation.md

`screen`: a ResNet-8 learns from a ResNet-56 for 6 epochs, one seed. `final`: a ResNet-20, 4 epochs, seeds 0, 1 and 2,
the label-only student, `kl` and the methods named. All 50,000 images train, the last epoch counts, and accuracy is
that on the 10,000 test images. Weights are those of the papers or their code; what is taught by logits alone replays
the teacher from a cache with as many views as epochs, which gives what the live teacher would. The figures of one
seed share initial weights, order and crops, so differences are paired. `tables` prints both as Markdown, and fills
them into a page between <!-- table:screen --> and <!-- /table:screen -->, and likewise for `final`.

TEACHERS holds resnet56.th and resnet20.th.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import edgekd
from edgekd.artifact import Artifact, write_atomically
from edgekd.bench import environment
from edgekd.data import load
from edgekd.recipe import parse_recipe
from edgekd.stages.teaching import load_network
from edgekd.train import predict

LAYERS = ["layer1", "layer2", "layer3"]
CE = {"use": "ce", "weight": 0.1}
KL = {"use": "kl", "weight": 0.9, "tau": 4.0}
BOTH = {"student": LAYERS, "teacher": LAYERS}
LAST = {"student": "layer3", "teacher": "layer3"}


#: What others are compared with.
VERSUS = ("labels", "kl")


def logits(*objectives: Any, **more: Any) -> dict[str, Any]:
    return {"objectives": list(objectives), "source": "cached", **more}


def features(*objectives: Any, **more: Any) -> dict[str, Any]:
    return {"objectives": ["ce", {**KL, "weight": 1.0}, *objectives], "source": {"use": "frozen"}, **more}


#: name -> what it changes in the stage `distill`; "source": "cached" is filled with the shared cache.
METHODS: dict[str, dict[str, Any]] = {
    "labels": {"objectives": ["ce"]},
    "label-smoothing": {"objectives": ["label-smoothing"]},
    "kl": logits(CE, KL),
    "kl, standardized": logits(CE, {"use": "kl", "weight": 9.0, "tau": 2.0, "standardize": True}),
    "kl, teacher-confidence": logits(CE, {**KL, "weight": {"use": "teacher-confidence"}}),
    "kl, disagreement": logits(CE, {**KL, "weight": {"use": "disagreement", "scale": 2.0}}),
    "kl, curriculum tau": logits(CE, {**KL, "tau": {"use": "curriculum"}}),
    "kl, labels fade in": logits(
        {"use": "ce", "weight": {"use": "linear", "start": 0.0, "end": 1.0}},
        {**KL, "weight": {"use": "linear", "start": 1.0, "end": 0.1}},
    ),
    "mse-logits": logits(CE, {"use": "mse-logits", "weight": 0.9}),
    "mse-probs": logits("ce", {"use": "mse-probs", "weight": 1.0}),
    "dkd": logits("ce", {"use": "dkd"}),
    "dkd, standardized": logits(CE, {"use": "dkd", "tau": 2.0, "weight": 2.0, "standardize": True}),
    "dist": logits("ce", {"use": "dist", "weight": 2.0}),
    "rkd": logits("ce", KL, {"use": "rkd", "weight": 0.02}),
    "pkt": logits("ce", KL, {"use": "pkt"}),
    "hint": features({"use": "hint", "student": "layer2", "teacher": "layer2"}),
    "hidden": features({"use": "hidden", **LAST}),
    "attention": features({"use": "attention", **BOTH, "weight": 500.0}),
    "review": features({"use": "review", **BOTH, "weight": 0.6}),
    "classifier-reuse": {
        "model": {"use": "reuse", "student": {"use": "cifar-resnet"}, "tap": "layer3", "channels": 64},
        "objectives": [{"use": "classifier-reuse", "teacher": "layer3"}],
    },
    "fsp": features({"use": "fsp", **BOTH}),
    "similarity": features({"use": "similarity", **LAST, "weight": 3000.0}),
    "crd": features({"use": "crd", **LAST, "weight": 0.8}),
    "byot": {"objectives": ["ce", {"use": "byot", "student": LAYERS}]},
    "teacher-free": {"objectives": ["ce", {"use": "kl", "tau": 20.0, "weight": 0.1}], "source": "teacher-free"},
    "ema": {"objectives": ["ce", {"use": "kl", "tau": 1.0}], "source": {"use": "ema", "decay": 0.99}},
    "peers": {"objectives": ["ce", {"use": "kl", "tau": 1.0}], "source": "peers", "twice": True},
    "ensemble, mean": logits(CE, KL, teacher=["teacher", "teacher-2"], of={"use": "ensemble"}),
    "ensemble, confidence": logits(
        CE, KL, teacher=["teacher", "teacher-2"], of={"use": "ensemble", "combine": "confidence"}
    ),
    "ensemble, random": {
        "objectives": [CE, KL],
        "source": {"use": "ensemble", "combine": "random"},
        "teacher": ["teacher", "teacher-2"],
    },
    "kl, mixup": {"objectives": [CE, KL], "mixture": "mixup"},
    "kl, cutmix": {"objectives": [CE, KL], "mixture": "cutmix"},
    "kl, random-erasing": {"objectives": [CE, KL], "mixture": "random-erasing"},
}


def recipe_of(method: str, depth: int, epochs: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The whole recipe of one run."""
    change = dict(METHODS[method])
    augment: list[Any] = ["crop-flip", *([change.pop("mixture")] if "mixture" in change else [])]
    of = change.pop("of", {"use": "frozen"})
    if change.get("source") == "cached":
        cache = options.runs / "cache" / f"{'-'.join(of.values())}-{epochs}-{seed}"
        change["source"] = {"use": "cached", "views": epochs, "of": of, "directory": str(cache)}
    student = {"use": "cifar-resnet", "depth": depth}
    if change.pop("twice", False):
        change["students"] = [{"model": student}, {"model": student}]
    elif "model" in change:
        change["model"] = {**change["model"], "student": student}
    else:
        change["model"] = student
    teachers = [("resnet56.th", 56), ("resnet20.th", 20)][: len(change.setdefault("teacher", ["teacher"]))]
    return {
        "version": 1,
        "name": "table",
        "seed": seed,
        "data": {
            "use": "cifar10",
            "root": str(options.data),
            "batch": 128,
            "augment": augment,
            "validation": 0.0,
            "normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        },
        "teacher": [
            {"model": {"use": "cifar-resnet", "depth": d}, "weights": str(options.teachers / f)} for f, d in teachers
        ],
        "stage": [{"use": "distill", "epochs": epochs, "lr": 0.2, "keep": "last", **change}],
    }


def trained(method: str, depth: int, epochs: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: the student's test accuracy after its last epoch, and what it cost."""
    recipe = parse_recipe(recipe_of(method, depth, epochs, seed, options))
    directory = options.runs / f"{depth}-{epochs}-{method.replace(', ', '-').replace(' ', '-')}-{seed}"
    began = time.monotonic()
    edgekd.run(recipe, directory=directory, until="distill.1" if "students" in recipe.stage[0].args else "distill")
    seconds = time.monotonic() - began
    [manifest] = (
        directory.glob("*-distill*/manifest.json")
        if method != "peers"
        else [next(directory.glob("*-distill.1-*/manifest.json"))]
    )
    artifact = Artifact.open(manifest.parent)
    data = load(recipe.data, seed)
    answers = predict(load_network(artifact), data.test, data, 250)
    accuracy = float((answers.argmax(1) == data.test.labels.numpy()).mean())
    return {"method": method, "depth": depth, "epochs": epochs, "seed": seed, "accuracy": accuracy,
            "seconds": round(seconds, 1), "macs": artifact.manifest.metrics["macs"],
            "cpu": environment()["cpu"], "threads": torch.get_num_threads()}  # fmt: skip


def paired(rows: list[dict[str, Any]], method: str, base: str) -> dict[str, Any] | None:
    """Mean difference to `base` over seeds with a 95 % interval (Student's t); None for fewer than two seeds."""
    own, other = ({r["seed"]: r["accuracy"] for r in rows if r["method"] == m} for m in (method, base))
    gaps = [own[seed] - other[seed] for seed in own if seed in other]
    if len(gaps) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5)
    mean = statistics.fmean(gaps)
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(gaps)}


def screen_table(rows: list[dict[str, Any]]) -> str:
    """One seed of every method as Markdown, best first; times are those on the machine of `labels`."""
    if not rows:
        return "Not measured yet."
    own = {r["method"]: r for r in rows if r["seed"] == 0}
    base = own.get("labels")
    lines = ["| method | accuracy | against labels | against `kl` | MACs | time |", "|---|---:|---:|---:|---:|---:|"]
    for method, row in sorted(own.items(), key=lambda item: -item[1]["accuracy"]):
        gaps = [_points(row["accuracy"] - own[m]["accuracy"]) if m in own and m != method else "–" for m in VERSUS]
        alike = base is not None and (row["cpu"], row["threads"]) == (base["cpu"], base["threads"])
        time_ = f"{row['seconds'] / base['seconds']:.2f}×" if base is not None and alike else "–"
        cells = [method, f"{100 * row['accuracy']:.2f} %", *gaps, f"{row['macs'] / 1e6:.1f} M", time_]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [f"`{m}`" for m in METHODS if m not in own]
    return "\n".join(lines) + (f"\n\nNot measured yet: {', '.join(missing)}." if missing else "")


def final_table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown, best first, with paired differences and their 95 % intervals."""
    if not rows:
        return "Not measured yet."
    methods = list(dict.fromkeys(r["method"] for r in rows))
    found = {m: [r["accuracy"] for r in rows if r["method"] == m] for m in methods}
    lines = ["| method | seeds | accuracy | against labels | against `kl` |", "|---|---:|---:|---:|---:|"]
    for method in sorted(methods, key=lambda m: -statistics.fmean(found[m])):
        gaps = [paired(rows, method, base) if base != method else None for base in VERSUS]
        own = found[method]
        spread = f" ± {100 * statistics.stdev(own):.2f}" if len(own) > 1 else ""
        shown = " | ".join(
            "–" if g is None else f"{_points(g['mean'])} \\[{_points(g['low'])}, {_points(g['high'])}\\]" for g in gaps
        )
        lines.append(f"| {method} | {len(own)} | {100 * statistics.fmean(own):.2f}{spread} % | {shown} |")
    return "\n".join(lines)


def _points(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")


def show_tables(into: Path | None, results: Path) -> None:
    """Print the tables; fill them into a page between its markers. Exits where a marker is missing."""
    tables = {
        "screen": screen_table(known(results / "distillation_screen.json")),
        "final": final_table(known(results / "distillation_table.json")),
    }
    text = into.read_text(encoding="utf-8") if into is not None else ""
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
        first, last = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
        if into is not None:
            before, found, rest = text.partition(first)
            _, found_end, after = rest.partition(last)
            if not (found and found_end):
                raise SystemExit(f"{into} has no markers {first} and {last}")
            text = f"{before}{first}\n\n{table}\n\n{last}{after}"
    if into is not None:
        write_atomically(into, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["screen", "final", "tables"])
    parser.add_argument("--methods", nargs="*", help="default: all in screen; labels and kl are always in final")
    parser.add_argument("--seeds", type=int, nargs="*", default=None)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--teachers", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation-table"))
    parser.add_argument("--out", type=Path, help="of screen and final: the results")
    parser.add_argument("--into", type=Path, help="of tables: a page with markers")
    options = parser.parse_args()
    if options.phase == "tables":
        show_tables(options.into, Path(__file__).parent / "results")
        return
    if options.out is None:
        parser.error("--out is needed")
    depth, epochs, seeds = (8, 6, [0]) if options.phase == "screen" else (20, 4, [0, 1, 2])
    seeds = options.seeds or seeds
    methods = options.methods or list(METHODS)
    if options.phase == "final":
        methods = list(dict.fromkeys(["labels", "kl", *(options.methods or [])]))
    for seed in seeds:
        for method in methods:
            if any((r["method"], r["seed"]) == (method, seed) for r in known(options.out)):
                continue
            row = trained(method, depth, epochs, seed, options)
            print(f"{method:<26} seed {seed}  {row['accuracy']:.2%}  {row['seconds']:.0f} s", flush=True)
            keep(options.out, row, options.phase, depth, epochs)


def known(file: Path) -> list[dict[str, Any]]:
    """The rows that are there already."""
    rows: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    return rows


def keep(file: Path, row: dict[str, Any], phase: str, depth: int, epochs: int) -> None:
    """Add a row to the file, which other processes may be writing to as well."""
    with file.with_suffix(".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        rows = [*known(file), row]
        versus = {m: paired(rows, m, "labels") for m in dict.fromkeys(r["method"] for r in rows) if m != "labels"}
        document = {
            "command": f"python benchmarks/distillation_table.py {phase}",
            "student": f"ResNet-{depth}",
            "epochs": epochs,
            "environment": environment(),
            "runs": rows,
            "against_labels": {m: v for m, v in versus.items() if v is not None},
        }
        write_atomically(file, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
