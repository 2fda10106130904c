"""`edgekd init`: the files that a new project starts from."""

from __future__ import annotations

from pathlib import Path

from .artifact import write_atomically
from .errors import UsageError
from .workflows import CI_FILES

__all__ = ["scaffold"]

RECIPE = """\
# Completion in editors: `edgekd schema > recipe.schema.json`, and "#:schema ./recipe.schema.json" as the first line.
# Run it with `edgekd run recipe.toml`; see what it would do with `edgekd check recipe.toml`.
version = 1
name    = "my-network"
seed    = 0
data    = { use = "own:data", batch = 64, augment = "crop-flip" }   # own.py beside this file; or digits, cifar10, ...

profiles = ["profile.toml"]              # the device: `edgekd list profiles` names those that edgekd ships

[teacher]
model  = { use = "own:network" }
epochs = 5                               # or: weights = "teacher.safetensors"
lr     = 0.1

[[stage]]
use        = "distill"                   # a small network learns from the teacher
model      = { use = "cifar-resnet", depth = 8 }
epochs     = 5
lr         = 0.1
objectives = [{ use = "ce", weight = 0.1 }, { use = "kl", weight = 0.9, tau = 4.0 }]

[[stage]]
use    = "prune"                         # channels that matter least go
target = { macs = 0.8 }                  # the share of multiply-accumulates that remains
heal   = { epochs = 2 }

[[stage]]
use  = "quantize"                        # int8, as the profile's runtime fuses it
heal = { epochs = 1 }                    # 0: calibration only

[[stage]]
use     = "export"
targets = ["onnx"]

[gate]                                   # exit code 1 when one of these fails
accuracy = { drop = 0.05 }               # against the teacher, same images: a fraction
latency  = { p50 = { speedup = 2.0 } }   # against the teacher, measured in the same run
size_mb  = { max = 1.0 }
"""

OWN = '''\
"""Your network and your data: replace both bodies."""

import numpy as np
from sklearn.datasets import load_digits
from torch import nn


def network(num_classes: int = 10) -> nn.Module:
    """Any nn.Module that maps images [N, C, H, W] to logits [N, num_classes]."""
    from edgekd.artifact import ModelSpec
    from edgekd.models import build

    return build(ModelSpec(use="cifar-resnet", args={"depth": 14, "num_classes": num_classes}))


def data():
    """(images, labels) arrays or torch Datasets for training and test, and the class names."""
    digits = load_digits()
    large = np.kron(digits.images * 15, np.ones((4, 4)))
    images = np.repeat(large[..., None], 3, axis=3).astype(np.uint8)  # arrays are [N, H, W, C], tensors [N, C, H, W]
    return {
        "train": (images[:1400], digits.target[:1400]),
        "test": (images[1400:], digits.target[1400:]),
        "classes": [str(name) for name in digits.target_names],
    }
'''

PROFILE = """\
# Your device: what is not said here is taken from the profile that it extends.
extends = "cpu-x86"
description = "my device"
threads = 1

[protocol]
rounds = 12
"""

FILES = {"recipe.toml": RECIPE, "own.py": OWN, "profile.toml": PROFILE}


REGRESS = 'latency  = { p50 = { speedup = 2.0, regress = "5%" } }   # regress: against the base branch, in CI'


def scaffold(directory: Path, force: bool = False, ci: str | None = None) -> list[Path]:
    """Write the starting files, with `ci` (github or gitlab) its workflow too, and return their paths.

    Where a recipe is there already, `ci` adds the workflow alone. Raises UsageError when a file to write is there and
    `force` is not set.
    """
    files = dict(FILES)
    if ci is not None:
        name, content = CI_FILES[ci]
        if (directory / "recipe.toml").exists() and not force:
            files = {}
        else:
            files["recipe.toml"] = _with_regress(RECIPE)
        files[name] = content
    there = [name for name in files if (directory / name).exists()]
    if there and not force:
        raise UsageError(f"{', '.join(there)} already there", where=str(directory), hint="--force overwrites")
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / name, content)
    return [directory / name for name in files]


def _with_regress(recipe: str) -> str:
    return "\n".join(REGRESS if line.startswith("latency ") else line for line in recipe.splitlines()) + "\n"
