"""What the tables of compression have in common: each row is a run of one CIFAR-10 recipe with its own stages.

All rows have the same teacher, data and normalisation. A row's figures are those of its exported file: accuracy in
ONNX Runtime on the 10,000 test images, size on disk, and how many times as fast as the teacher's float file it is, all
files measured in one session on the profile cpu-x86. A run that was killed resumes, and rows that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.artifact import Artifact, write_atomically
from edgekd.bench import disturbances, environment, others_busy, paired_drop, paired_ratio, round_medians, side_by_side
from edgekd.candidates import candidate_of
from edgekd.data import Dataset
from edgekd.errors import EdgekdError
from edgekd.onnx_file import optimised_layers, stored_bytes
from edgekd.pipeline import plan, run_steps
from edgekd.profile import load_profile
from edgekd.recipe import Recipe, parse_recipe
from edgekd.scorecard import answers

PROFILE = "cpu-x86"
TAUGHT = [{"use": "ce", "weight": 0.1}, {"use": "mse-logits", "weight": 0.9}]
NORMALIZE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

Stages = list[dict[str, Any]]


def cached(options: argparse.Namespace, views: int, seed: int) -> dict[str, Any]:
    """The teacher's answers to so many crops of every image, shared by all rows of a seed."""
    return {"use": "cached", "views": views, "directory": str(options.runs / f"cache-{views}-{seed}")}


def healing(options: argparse.Namespace, seed: int, epochs: int, lr: float) -> dict[str, Any]:
    """Training with the teacher; the last epoch counts."""
    source = cached(options, options.views, seed)
    return {"epochs": epochs, "lr": lr, "objectives": TAUGHT, "source": source, "teacher": "teacher", "keep": "last"}


def recipe_of(stages: Stages, seed: int, options: argparse.Namespace) -> Recipe:
    """Every row's recipe. The second teacher, where its weights are given, is a network to start from."""
    teachers = [{"model": {"use": "cifar-resnet", "depth": 56}, "weights": str(options.teacher)}]
    if getattr(options, "start", None):
        teachers.append({"model": {"use": "cifar-resnet", "depth": 20}, "weights": str(options.start)})
    data = {"use": "cifar10", "root": str(options.data), "batch": 128, "augment": "crop-flip", "validation": 0.0}
    return parse_recipe(
        {
            "version": 1,
            "name": "row",
            "seed": seed,
            "profiles": [PROFILE],
            "data": {**data, "normalize": NORMALIZE},
            "teacher": teachers,
            "stage": [*stages, {"use": "export"}],
        }
    )


def options_of(text: str | None, *, rows: Sequence[str], runs: str, out: str) -> argparse.ArgumentParser:
    """The options that all of the tables take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="run", choices=["run", "table"], help="table: print what is there")
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds cifar-10-batches-bin")
    parser.add_argument("--teacher", type=Path, default=Path("data/resnet56.th"))
    parser.add_argument("--runs", type=Path, default=Path("runs") / runs)
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--views", type=int, default=8, help="crops per image that the teacher answers")
    parser.add_argument("--into", type=Path, help="the page that has the table between its markers")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / out)
    return parser


def fill(options: argparse.Namespace, stages_of: Callable[[str, int, argparse.Namespace], Stages], marker: str) -> None:
    """Run the rows that are missing, measure all of them, and print the table (or only print it)."""
    if options.what == "run":
        options.runs.mkdir(parents=True, exist_ok=True)
        _run(options, stages_of)
    text = table(json.loads(options.out.read_text()))
    print(text)
    if options.into is not None:
        page, begin, end = options.into.read_text(), f"<!-- table:{marker} -->", f"<!-- /table:{marker} -->"
        options.into.write_text(f"{page.partition(begin)[0]}{begin}\n{text}\n{end}{page.partition(end)[2]}")


def directory_of(row: str, seed: int, options: argparse.Namespace) -> Path:
    return options.runs / f"{''.join(c if c.isalnum() else '-' for c in row)}-{seed}"


def manifest_of(row: str, seed: int, options: argparse.Namespace, kind: str) -> Artifact:
    """A row's last artifact of a kind. Raises ValueError where the row has not been run."""
    *_, last = sorted(directory_of(row, seed, options).glob(f"*-{kind}*/manifest.json"))
    return Artifact.open(last.parent)


def _run(options: argparse.Namespace, stages_of: Callable[[str, int, argparse.Namespace], Stages]) -> None:
    done: list[dict[str, Any]] = json.loads(options.out.read_text())["runs"] if options.out.is_file() else []
    document: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "runs": done, "files": {}}
    data: Dataset | None = None
    for seed in options.seeds:
        for row in options.rows:
            stages = stages_of(row, seed, options)
            if any((r["row"], r["seed"], r["stages"]) == (row, seed, stages) for r in done):
                continue
            planned = plan(recipe_of(stages, seed, options), directory_of(row, seed, options), data=data)
            data = planned.data
            began = time.monotonic()
            try:
                *_, artifact = run_steps(planned, lambda event: None)
            except EdgekdError as error:  # a budget out of reach is a result, too
                document["failed"] = {**document.get("failed", {}), row: str(error)}
                print(f"{row}: {error}", flush=True)
                continue
            done[:] = [r for r in done if (r["row"], r["seed"]) != (row, seed)]
            done.append(
                {
                    "row": row,
                    "seed": seed,
                    "stages": stages,
                    "accuracy": float(correct(artifact.file("model.onnx"), data).mean()),
                    "seconds": round(time.monotonic() - began, 1),
                    "threads": torch.get_num_threads(),
                    "cpu": environment()["cpu"],
                }
            )
            print({k: v for k, v in done[-1].items() if k != "stages"}, flush=True)
            write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    first = plan(recipe_of([], 0, options), options.runs / "teacher", data=data)
    teacher, *_ = run_steps(first, lambda event: None, until="teacher")
    files = {"teacher": candidate_of(teacher, "teacher", first.data, 18, options.runs).file}
    for run in done:
        if run["seed"] == options.seeds[0]:
            files[run["row"]] = manifest_of(run["row"], run["seed"], options, "export").file("model.onnx")
    document |= {"profile": PROFILE, "files": measured(files, first.data)}
    write_atomically(options.out, json.dumps(document, indent=1) + "\n")


def correct(file: Path, data: Dataset) -> NDArray[np.bool_]:
    """bool [N]: whether a model file is right about each test image, in ONNX Runtime."""
    return answers(file, data).argmax(1) == data.test.labels.numpy()


def measured(files: Mapping[str, Path], data: Dataset) -> dict[str, Any]:
    """Size, layers and latency of every file, interleaved; what it loses against the teacher on the same images."""
    surroundings, others = environment(), others_busy()
    found = side_by_side(files, load_profile(PROFILE), rounds=12, cap_s=60.0 + 10.0 * len(files))
    busy = others()
    medians = round_medians(found.samples)
    before = correct(files["teacher"], data)
    rows: dict[str, Any] = {"teacher": {"accuracy": float(before.mean())}}
    for name, file in files.items():
        lost = paired_drop(before, correct(file, data))
        ratio = paired_ratio(medians["teacher"], medians[name])
        rows.setdefault(name, {}).update(
            p50_ms=found.latencies[name].p50.value,
            speedup=ratio.value,
            interval=[ratio.low, ratio.high],
            lost=[lost.value, lost.low, lost.high],
            rounds=len(medians[name]),
            mb=stored_bytes(file) / 1e6,
            layers=optimised_layers(file),
        )
    rows["machine"] = {
        "environment": surroundings,
        "others_busy_cores": busy,
        "warnings": disturbances(surroundings, busy or 0.0),
    }
    return rows


def table(document: dict[str, Any]) -> str:
    """Markdown, the most accurate row first."""
    lines = ["| row | seeds | accuracy | below the teacher | times as fast | MB | int8 / float layers |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    runs: dict[str, list[float]] = {}
    for run in document["runs"]:
        runs.setdefault(run["row"], []).append(run["accuracy"])
    files = document["files"]
    if "teacher" not in files:
        return "Not measured yet."
    whole = files["teacher"]["accuracy"]
    for row, found in [("teacher", [whole]), *sorted(runs.items(), key=lambda item: -statistics.fmean(item[1]))]:
        mean = statistics.fmean(found)
        spread = f" ± {100 * statistics.stdev(found):.2f}" if len(found) > 1 else ""
        file = files.get(row)
        cells = [row, "–" if row == "teacher" else str(len(found)), f"{100 * mean:.2f} %{spread}"]
        below = f"{100 * (whole - mean):.2f}"
        if file and len(found) == 1:  # of that one network: the test images alone
            below += " [{:.2f}, {:.2f}]".format(*(100 * bound for bound in file["lost"][1:]))
        cells.append("–" if row == "teacher" else below)
        if file:
            low, high = file["interval"]
            cells += [f"{file['speedup']:.2f} [{low:.2f}, {high:.2f}]", f"{file['mb']:.2f}"]
            cells.append(f"{file['layers']['int8']} / {file['layers']['float']}")
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{row}: {error}" for row, error in document.get("failed", {}).items() if row not in runs]
    return "\n".join([*lines, *(["", *notes] if notes else [])])
