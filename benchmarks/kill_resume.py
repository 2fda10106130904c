"""Kill a run with SIGKILL at a random moment, start it again, and compare every artifact with an undisturbed run's.

    python benchmarks/kill_resume.py --kills 10 --out benchmarks/results/kill_resume.json

Each kill is a run of its own, in a fresh directory: started, killed after a random share of the undisturbed run's
time (measuring at its end included), started again until it ends. The artifacts' files must have the same sha256 as
those of the run that nobody touched.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgekd.artifact import write_atomically
from edgekd.bench import environment


def hashes(run: Path) -> dict[str, str]:
    """`stage/file` -> sha256, from the manifests (whose files `edgekd` checks when it opens them)."""
    found = {}
    for manifest in sorted(run.glob("*/manifest.json")):
        files = json.loads(manifest.read_text())["files"]
        # metrics.jsonl holds throughput, which is a time
        found |= {f"{manifest.parent.name}/{n}": sha for n, (sha, _) in files.items() if n != "metrics.jsonl"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:

        def command(name: str) -> list[str]:
            sets = [word for o in options.overrides for word in ("--set", o)]
            run = str(Path(scratch) / name)
            return [sys.executable, "-m", "edgekd", "run", options.recipe, "--until", "export", "-o", run, *sets]

        def to_the_end(name: str) -> None:
            """The gate is not what is looked at here: short trainings fail it, and it ends with 1 or 4."""
            done = subprocess.run(command(name), check=False, capture_output=True, text=True)
            if done.returncode not in (0, 1, 4):
                sys.exit(f"exit code {done.returncode}\n{done.stderr}")

        start = time.monotonic()
        to_the_end("whole")
        whole = time.monotonic() - start
        expected = hashes(Path(scratch) / "whole")
        rows: list[dict[str, Any]] = []
        for number in range(options.kills):
            name = f"killed-{number}"
            moment = draw.uniform(0.05, 0.97)
            process = subprocess.Popen(command(name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moment * whole)
            ended = process.poll() is not None
            process.send_signal(signal.SIGKILL)
            process.wait()
            partial = [p.name for p in (Path(scratch) / name / ".partial").glob("*")]
            complete = len(list((Path(scratch) / name).glob("*/manifest.json")))
            to_the_end(name)
            same = hashes(Path(scratch) / name) == expected
            during = partial[0] if partial else f"after {complete} complete stages"
            rows.append({"share_of_run": round(moment, 3), "during": during, "had_ended": ended, "same_hashes": same})
            print(rows[-1], flush=True)
            shutil.rmtree(Path(scratch) / name)
    document = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "undisturbed_s": round(whole, 1),
        "files_compared": expected,
        "kills": rows,
        "all_same": all(row["same_hashes"] for row in rows),
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    print("all the same" if document["all_same"] else "DIFFERENT", f"({len(rows)} kills, {whole:.0f} s undisturbed)")
    sys.exit(0 if document["all_same"] else 1)


if __name__ == "__main__":
    main()
