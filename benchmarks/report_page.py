"""What a report page costs a browser: its size, how long it takes to open, and what the console says.

    python benchmarks/report_page.py runs/cifar10-edge/report.html --out benchmarks/results/report_page.json

Headless Chromium opens the page and an empty one in turns, each in a process of its own that renders and ends; the
difference of the medians is what the page takes. Light, dark, and a phone's width in a frame of 390 pixels; pictures
are written beside --out with --pictures.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgekd.artifact import write_atomically
from edgekd.bench import environment

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip


def opened(
    browser: str, page: Path, picture: Path, size: tuple[int, int], dark: bool = False
) -> tuple[float, list[str]]:
    """Seconds of the whole process, and the lines that the page wrote to the console."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--screenshot={picture}"]
        command += [f"--window-size={size[0]},{size[1]}"] + (
            ["--blink-settings=preferredColorScheme=0"] if dark else []
        )
        start = time.monotonic()
        done = subprocess.run([*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=120)
        seconds = time.monotonic() - start
    if done.returncode or not picture.exists():
        raise SystemExit(f"the browser failed: {done.stderr[-500:]}")
    return seconds, [line for line in done.stderr.splitlines() if re.search(r"CONSOLE", line)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome") or "chromium")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        place = options.pictures or Path(text)
        place.mkdir(parents=True, exist_ok=True)
        empty = Path(text) / "empty.html"
        empty.write_text("<!doctype html><title>empty</title>")
        phone = Path(text) / "phone.html"
        frame = f'<iframe src="{options.page.resolve().as_uri()}" style="width:390px;height:9000px;border:0"></iframe>'
        phone.write_text(f'<!doctype html><body style="margin:0">{frame}')
        taken: dict[str, list[float]] = {"page": [], "empty": []}
        console: list[str] = []
        for _ in range(options.rounds):
            for name, file in (("page", options.page), ("empty", empty)):
                seconds, lines = opened(options.browser, file, place / "light.png", (1200, 6000))
                taken[name].append(seconds)
                console += lines if name == "page" else []
        for name, file, size, dark in (
            ("light", options.page, (1200, 6000), False),
            ("dark", options.page, (1200, 6000), True),
            ("phone", phone, (500, 9000), False),
        ):
            console += opened(options.browser, file, place / f"{name}.png", size, dark)[1]
    version = subprocess.run([options.browser, "--version"], capture_output=True, text=True).stdout.strip()
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "bytes": options.page.stat().st_size,
        "opens_s": statistics.median(taken["page"]) - statistics.median(taken["empty"]),
        "seconds": taken,
        "console": console,
        "browser": version,
        "environment": environment(),
    }
    print(json.dumps({k: document[k] for k in ("bytes", "opens_s", "console", "browser")}, indent=1))
    if options.out is not None:
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
