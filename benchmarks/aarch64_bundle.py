"""A bundle's runner on aarch64 under user-mode emulation: the same accuracy on real images as here. No times.

    python benchmarks/aarch64_bundle.py --data data --weights data/resnet20.th \\
        --out benchmarks/results/aarch64_bundle.json

A trained ResNet-20, quantized for ARM and in float, goes into a bundle each with 1,000 CIFAR-10 test images, and their
run.py is run twice: by this Python, and by Debian's arm64 Python with the aarch64 wheels of NumPy and ONNX Runtime, in
QEMU. An emulated core takes some 0.03 s for an image in int8, and ten times as long in float.
Debian or Ubuntu on x86-64 only; before, as root:

    apt-get install qemu-user-static && dpkg --add-architecture arm64 && apt-get update
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import write_atomically
from edgekd.bench import Results, environment, unpacked
from edgekd.bundle import BundleFile, make_bundle, read_results
from edgekd.candidates import candidate_of
from edgekd.data import Dataset, load
from edgekd.profile import Protocol, load_profile
from edgekd.recipe import load_recipe
from edgekd.runs import find_source

#: Results as edgekd reads them and as they are, and seconds.
Ran = tuple[Results, dict[str, Any], float]
RECIPE = """\
version = 1
name = "aarch64"
profiles = ["cpu-arm64"]

[data]
use = "cifar10"
root = "{data}"
normalize = {{ mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }}

[teacher]
model = {{ use = "cifar-resnet", depth = 20 }}
weights = "{weights}"

[[stage]]
use = "quantize"
heal = {{ epochs = 0 }}

[[stage]]
use = "export"
"""
#: As little measuring as can be: its times mean nothing.
PROTOCOL = Protocol(rounds=3, precision=10.0, block_s=0.01, warmup_s=0.01, cap_s=1.0)
PROFILE = load_profile("cpu-arm64").model_copy(update={"protocol": PROTOCOL, "threads": 1})
#: What Python and the two wheels load.
PACKAGES = (
    "libc6", "libgcc-s1", "libstdc++6", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib",
    "libexpat1", "zlib1g", "libbz2-1.0", "liblzma5", "libffi8", "libssl3", "libcrypt1",
)  # fmt: skip
#: QEMU shows the host's /proc/cpuinfo, in which ONNX Runtime finds no ARM core and crashes. These are the lines of a
#: Cortex-A76 (Raspberry Pi 5), which QEMU emulates below.
CORE = """\
processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the directory of cifar-10-batches-bin")
    parser.add_argument("--weights", type=Path, default=Path("data/resnet20.th"), help="a trained ResNet-20")
    parser.add_argument("--scratch", type=Path, help="keeps the root file system and the run; default: thrown away")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--float-images", type=int, default=1000, help="fewer for the float network, to save time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        files, images = networks(scratch, options.data.resolve(), options.weights.resolve())
        python = emulator(scratch)
        rows = []
        for file, count in zip(files, (1000, options.float_images), strict=True):
            bundle = make_bundle([file], scratch / f"bundle-{file.name}", PROFILE, images, images=count)
            here = ran([sys.executable], bundle, scratch / f"here-{file.name}")
            rows.append(compared(here, ran(python, bundle, scratch / f"emulated-{file.name}")))
        found = {
            "command": " ".join(["python", *sys.argv]),
            "emulator": output(["qemu-aarch64-static", "--version"]).partition("\n")[0],
            "networks": rows,
            "environment": environment(),
        }
    print(json.dumps(rows, indent=1))
    if options.out is not None:
        write_atomically(options.out, json.dumps(found, indent=1) + "\n")


def networks(scratch: Path, data: Path, weights: Path) -> tuple[list[BundleFile], Dataset]:
    """The ResNet-20 in int8 for ARM and in float, and the data."""
    recipe = scratch / "recipe.toml"
    recipe.write_text(RECIPE.format(data=data, weights=weights))
    subprocess.run([sys.executable, "-m", "edgekd", "run", str(recipe), "-o", str(scratch / "run")], check=True)
    planned = load_recipe(recipe)
    images = load(planned.data, planned.seed)
    teacher = find_source(f"{scratch / 'run'}:teacher").artifact
    exported = find_source(f"{scratch / 'run'}:export").artifact
    plain = candidate_of(teacher, "teacher", images, 18, scratch / "onnx").file
    int8 = BundleFile("int8", exported.file("model.onnx"), exported.key, "arm-s8s8")
    return [int8, BundleFile("fp32", plain, teacher.key)], images


def emulator(scratch: Path) -> list[str]:
    """An aarch64 Python with NumPy and ONNX Runtime of the versions here, as the command that starts it."""
    root, site = scratch / "root", scratch / "site"
    for directory in (scratch / "debs", scratch / "wheels", root / "proc", site):
        directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *(f"{p}:arm64" for p in PACKAGES)], cwd=scratch / "debs", check=True)
    for package in sorted((scratch / "debs").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    wanted = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
    target = ["--python-version=3.11", "--implementation=cp", "--only-binary=:all:", "--no-deps", *platforms]
    pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(scratch / "wheels")]
    subprocess.run([*pip, *target, *wanted], check=True)
    for wheel in (scratch / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    cores = range(os.cpu_count() or 1)
    (root / "proc" / "cpuinfo").write_text("".join(CORE.format(number=number) for number in cores))
    variables = {"PYTHONHOME": root / "usr", "PYTHONPATH": site, "OMP_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}
    passed = [part for name, value in variables.items() for part in ("-E", f"{name}={value}")]
    command = ["qemu-aarch64-static", "-cpu", "cortex-a76", "-L", str(root), *passed]
    return [*command, str(root / "usr" / "bin" / "python3.11")]


def ran(python: list[str], bundle: Path, out: Path) -> Ran:
    """The results of run.py, as edgekd reads them and as they are, and its seconds."""
    begun = time.monotonic()
    subprocess.run([*python, str(bundle / "run.py"), "--again", "--out", str(out)], check=True)
    results = out / "results.json"
    return read_results(results), json.loads(results.read_text()), round(time.monotonic() - begun, 1)


def compared(
    here: tuple[Results, dict[str, Any], float], there: tuple[Results, dict[str, Any], float]
) -> dict[str, Any]:
    """Accuracies of both, and on how many images both are right or wrong alike."""
    images = here[0].test_images
    one, other = (results.profiles[0].variants[0] for results in (here[0], there[0]))
    right = [unpacked(str(v.correct), images) for v in (one, other)]
    device = there[1]["device"]
    return {
        "network": one.name,
        "images": images,
        "accuracy_here": one.metrics["accuracy"],
        "accuracy_aarch64": other.metrics["accuracy"],
        "alike": int(np.sum(right[0] == right[1])),
        "aarch64_against_reference": there[1]["networks"][one.name]["comparison"],
        "seconds_here": here[2],
        "seconds_aarch64": there[2],
        "aarch64": {key: device[key] for key in ("machine", "instruction_sets", "versions")},
    }


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    if platform.machine() != "x86_64":
        sys.exit("this emulates aarch64 on x86-64; on an ARM machine run the bundle itself")
    main()
