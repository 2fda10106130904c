"""The whole chain on CIFAR-10 with a trained ResNet-56: `recipes/cifar10-edge.toml`, timed, as a table.

    python benchmarks/cifar10_edge.py --data data --teacher data/resnet56.th

Writes benchmarks/results/cifar10-edge.json (results.json, verdicts, seconds) and .md, and keeps the run under runs/.
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
    parser.add_argument("--run", type=Path, default=Path("runs/cifar10-edge"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    sets = [f'data.root="{options.data}"', f'teacher.weights="{options.teacher}"', *options.overrides]
    command = ["edgekd", "run", "cifar10-edge", "-o", str(options.run), *(w for s in sets for w in ("--set", s))]
    clock = options.run / "seconds.json"
    before = json.loads(clock.read_text()) if clock.exists() else []
    start = time.monotonic()
    try:
        done = subprocess.run([sys.executable, "-m", *command], check=False)
    finally:
        if options.run.is_dir():
            write_atomically(clock, json.dumps([*before, round(time.monotonic() - start, 1)]))
    if done.returncode not in (0, 1, 4):
        sys.exit(done.returncode)
    seconds = json.loads(clock.read_text())
    results, verdicts = Results.read(options.run / "results.json"), read(options.run / "gate.json")
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    document: dict[str, Any] = {
        "command": " ".join(command),
        "seconds": seconds,
        "gate_exit_code": done.returncode,
        "verdicts": [v.model_dump(mode="json") for v in verdicts],
        "results": results.model_dump(mode="json"),
    }
    write_atomically(out / "cifar10-edge.json", json.dumps(document, indent=1) + "\n")
    title = f"Made by `python benchmarks/cifar10_edge.py` in {sum(seconds) / 60:.1f} minutes.\n\n"
    write_atomically(out / "cifar10-edge.md", title + render(results, verdicts, "md"))
    shutil.copy(options.run / "report.html", out / "cifar10-edge.html")
    print(render(results, verdicts, "text"))


if __name__ == "__main__":
    main()
