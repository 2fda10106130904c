"""Networks: built from a JSON-able spec, filled with weights, tapped for features, and counted.

`build(spec)` is pure in the architecture: a pruned network is its spec, the attributes that pruning changed,
and a safetensors file. Importing this package registers the built-in networks.
"""

from __future__ import annotations

from . import auto, average, cifar_resnet, ecosystem, mobilenet, reuse, vit  # noqa: F401 (importing them registers their networks)
from .build import build, changed_attributes, specify, without_blocks
from .count import count
from .state import load_state, save_state
from .taps import Tapped, outputs, tap_paths
from .weights import load_weights

__all__ = [
    "Tapped",
    "build",
    "changed_attributes",
    "count",
    "load_state",
    "load_weights",
    "outputs",
    "save_state",
    "specify",
    "tap_paths",
    "without_blocks",
]
