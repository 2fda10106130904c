"""A bundle: everything a device that is elsewhere needs to build, compare and measure networks, and how to read back.

bundle.json     manifest: profile, protocol, networks, sha256 of every file
*.onnx          the networks
inputs.npz      real inputs, with labels where there are any
expected.npz    what ONNX Runtime gave for them
run.py          the runner: Python 3.8, NumPy and the device's own runtime
README.txt      how to run it
"""

from __future__ import annotations

from .make import BundleFile, bundle_of, make_bundle
from .read import is_runners, read_results
from .single_file import runner_source

__all__ = ["BundleFile", "bundle_of", "is_runners", "make_bundle", "read_results", "runner_source"]
