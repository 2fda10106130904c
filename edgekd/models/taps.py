"""Logits and intermediate features of any network, by module path."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError

__all__ = ["Tapped", "outputs", "tap_paths"]

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Tapped(nn.Module):
    """A network whose forward gives `{"logits": [N, K], path: feature, ...}` for the module paths in `taps`.

    Where a module runs several times in one forward, its last output counts; of a tuple or dict, the first tensor.
    Works under `torch.export` (non-strict). Raises UsageError for a path the network does not have.
    """

    def __init__(self, network: nn.Module, taps: Sequence[str] = ()) -> None:
        super().__init__()
        known = tap_paths(network)
        for tap in taps:
            if tap not in known:
                close = difflib.get_close_matches(tap, known, n=3, cutoff=0.5)
                top = f"at the top: {', '.join(path for path in known if '.' not in path)}"
                hint = f"did you mean {' or '.join(map(repr, close))}? {top}" if close else top
                raise UsageError(f"the network has no module {tap!r} to tap", hint=hint)
        self.network = network
        self.taps = tuple(dict.fromkeys(taps))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [N, C, H, W] -> logits [N, K] and each tapped feature in its module's own shape."""
        features: dict[str, Tensor] = {}

        def keep(path: str) -> Any:
            def hook(_module: nn.Module, _args: Any, result: Any) -> None:
                # A copy: the network may go on to change what a module returned in place.
                features[path] = _first_tensor(result, path).clone()

            return hook

        # Hooks that live for one call: nothing outlives it, and torch.export sees no tensor assigned to a module.
        handles = [self.network.get_submodule(path).register_forward_hook(keep(path)) for path in self.taps]
        try:
            result = outputs(self.network(x))
        finally:
            for handle in handles:
                handle.remove()
        for path in self.taps:
            if path not in features:
                raise UsageError(f"the tapped module {path!r} does not run in the network's forward")
        return {**result, **{path: features[path] for path in self.taps}}


def tap_paths(network: nn.Module) -> list[str]:
    """The module paths that `Tapped` can read, in the network's own order."""
    return [path for path, module in network.named_modules() if path and not isinstance(module, _NEVER_CALLED)]


def outputs(network_result: Any) -> dict[str, Tensor]:
    """What a network returned as `{"logits": [N, K], ...}`.

    Takes a tensor, a mapping with "logits" (its other tensors are kept), or an object with `.logits` (Transformers).
    Raises UsageError for anything else.
    """
    if isinstance(network_result, Tensor):
        return {"logits": network_result}
    if isinstance(network_result, Mapping) and isinstance(network_result.get("logits"), Tensor):
        return {name: value for name, value in network_result.items() if isinstance(value, Tensor)}
    logits = getattr(network_result, "logits", None)
    if isinstance(logits, Tensor):
        return {"logits": logits}
    found = f"a mapping with {sorted(map(str, network_result))}" if isinstance(network_result, Mapping) else None
    raise UsageError(
        f"the network returned {found or type(network_result).__name__}, which has no logits",
        hint='its forward may return a tensor [N, classes], a dict with "logits", or an object with .logits',
    )


def _first_tensor(result: Any, path: str) -> Tensor:
    if isinstance(result, Tensor):
        return result
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise UsageError(f"the tapped module {path!r} returns {type(result).__name__}, which holds no tensor")
