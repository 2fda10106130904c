"""The network of an artifact as PyTorch runs it: the runtime `torch` of a profile."""

from __future__ import annotations

import torch

from ..artifact import Artifact, TensorInfo
from ..profile import Profile
from ..runtimes.torch_session import TorchSession
from .teaching import load_network

__all__ = ["open_network"]


def open_network(artifact: Artifact, profile: Profile) -> TorchSession:
    """A session on the float network of an artifact: image float32 [batch, C, H, W] -> logits float32 [batch, K].

    Device, precision, threads and CUDA graphs are the profile's. Raises ArtifactError (a quantized or an exported
    artifact: PyTorch has no kernels for the one, and the other holds a file), MissingExtra or StageError (no GPU).
    """
    manifest = artifact.manifest
    network, options = load_network(artifact).eval(), profile.runtime_options
    torch.set_num_threads(profile.threads)
    return TorchSession(
        network,
        [TensorInfo(name="image", dtype="float32", axes=["batch", *manifest.preprocessing.size])],
        [TensorInfo(name="logits", dtype="float32", axes=["batch", len(manifest.classes)])],
        str(artifact.path),
        **{name: options[name] for name in ("device", "precision", "cuda_graphs")},
    )
