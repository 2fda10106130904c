"""A shipped CIFAR-10 recipe with a trained ResNet-56, timed, as a table: the whole chain, or the best student.

    python benchmarks/cifar10_edge.py --data data --teacher data/resnet56.th
    python benchmarks/cifar10_edge.py --recipe cifar10-resnet20 --data data --teacher data/resnet56.th

Writes benchmarks/results/RECIPE.json (results.json, verdicts, seconds), .md and .html, and keeps the run under runs/.
Run again, it resumes; the seconds of an interrupted run are those of all its parts together.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgekd.artifact import write_atomically
from edgekd.bench import Results
from edgekd.gate import read
from edgekd.report import render

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="holds cifar-10-batches-bin")
    parser.add_argument("--teacher", default="data/resnet56.th", help="the trained ResNet-56's state dict")
    parser.add_argument("--recipe", default="cifar10-edge", help="a shipped recipe")
    parser.add_argument("--run", type=Path, help="default: runs/RECIPE")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    name, run = options.recipe, options.run or Path("runs") / options.recipe
    sets = [f'data.root="{options.data}"', f'teacher.weights="{options.teacher}"', *options.overrides]
    command = ["edgekd", "run", name, "-o", str(run), *(w for s in sets for w in ("--set", s))]
    clock = run / "seconds.json"
    before = json.loads(clock.read_text()) if clock.exists() else []
    start = time.monotonic()
    try:
        done = subprocess.run([sys.executable, "-m", *command], check=False)
    finally:
        if run.is_dir():
            write_atomically(clock, json.dumps([*before, round(time.monotonic() - start, 1)]))
    if done.returncode not in (0, 1, 4):
        sys.exit(done.returncode)
    seconds = json.loads(clock.read_text())
    results, verdicts = Results.read(run / "results.json"), read(run / "gate.json")
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    document: dict[str, Any] = {
        "command": " ".join(command),
        "seconds": seconds,
        "gate_exit_code": done.returncode,
        "verdicts": [v.model_dump(mode="json") for v in verdicts],
        "results": results.model_dump(mode="json"),
    }
    write_atomically(out / f"{name}.json", json.dumps(document, indent=1) + "\n")
    title = f"Made by `python benchmarks/cifar10_edge.py --recipe {name}` in {sum(seconds) / 60:.1f} minutes.\n\n"
    write_atomically(out / f"{name}.md", title + render(results, verdicts, "md"))
    shutil.copy(run / "report.html", out / f"{name}.html")
    print(render(results, verdicts, "text"))


if __name__ == "__main__":
    main()
