"""A network's own weights as safetensors, exact in both directions, pruned networks included."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import ArtifactError, StageError

__all__ = ["load_state", "save_state"]


def save_state(module: nn.Module, path: str | Path) -> None:
    """Write all parameters and buffers of `module`, bit for bit, under their own names.

    Tied tensors are written under each of their names, and any memory format as contiguous: safetensors stores
    neither. Raises StageError when the disk refuses.
    """
    state = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise StageError(f"{name} is {type(value).__name__}, not a tensor: it cannot be stored", where=str(path))
        state[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        safetensors.torch.save_file(state, str(path))
    except (OSError, SafetensorError) as error:
        raise StageError(f"cannot write: {error}", where=str(path), hint="is the disk full?") from error


def load_state(module: nn.Module, path: str | Path) -> None:
    """Fill `module` from what `save_state` wrote, resizing its tensors to the stored shapes (pruned networks).

    Tied parameters stay tied, and devices and memory formats stay as they are. Raises ArtifactError when the file
    is missing or damaged, or when its names are not exactly those of the network.
    """
    hint = "was the file written for another network? if it is damaged, run the stage that wrote it again"
    try:
        stored = safetensors.torch.load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the weights: {error}", where=str(path), hint=hint) from error
    own = module.state_dict(keep_vars=True)
    if own.keys() != stored.keys():
        missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
        raise ArtifactError(
            f"the weights are those of another network: {len(missing)} missing {missing[:8]}, "
            f"{len(unexpected)} unexpected {unexpected[:8]}",
            where=str(path),
            hint=hint,
        )
    with torch.no_grad():
        for name, tensor in own.items():
            value = stored[name]
            if tensor.shape == value.shape and tensor.dtype == value.dtype:
                tensor.copy_(value)
            else:
                tensor.data = value.to(tensor.device)
                tensor.grad = None
