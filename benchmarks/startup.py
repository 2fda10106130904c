"""How long `edgekd --help` takes, beside an empty Python process; alternating, as whole processes.

python benchmarks/startup.py --out benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from edgekd.artifact import write_atomically
from edgekd.bench import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    program = shutil.which("edgekd", path=str(Path(sys.executable).parent)) or "edgekd"
    commands = {"edgekd --help": [program, "--help"], "empty python": [sys.executable, "-c", "pass"]}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(options.runs + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if number:  # the first one compiles and fills the disk cache
                taken[name].append(round(time.perf_counter() - start, 4))
    document = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "seconds": taken,
        "median_s": {name: statistics.median(values) for name, values in taken.items()},
        "target_s": 0.3,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    print(document["median_s"])


if __name__ == "__main__":
    main()
