"""What runs before the first layer that a change touches, so that it need not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["Calls", "reusing", "run_keeping"]


class Calls:
    """When each module was called in one forward pass, and when it returned."""

    def __init__(self, times: Mapping[str, list[tuple[int, int]]]) -> None:
        self._times = times

    @classmethod
    def of(cls, network: nn.Module, images: Tensor) -> Calls:
        """Watch one forward pass."""
        times: dict[str, list[tuple[int, int]]] = {}
        begun: dict[str, list[int]] = {}
        clock = 0

        def tick() -> int:
            nonlocal clock
            clock += 1
            return clock

        def enter(path: str) -> Callable[..., None]:
            return lambda *_: begun.setdefault(path, []).append(tick())

        def leave(path: str) -> Callable[..., None]:
            return lambda *_: times.setdefault(path, []).append((begun[path].pop(), tick()))

        handles = []
        for path, module in network.named_modules():
            handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave(path))]
        try:
            network(images)
        finally:
            for handle in handles:
                handle.remove()
        return cls(times)

    def before(self, network: nn.Module, paths: Iterable[str]) -> list[str]:
        """The largest modules that ran once, and returned before anything ran that is, or holds, one of `paths`."""
        return list(self._finished(network, "", min(self._start(path) for path in paths)))

    def _start(self, path: str) -> int:
        # A parameter, or a module that is read without being called, counts from the start of what holds it.
        while path and path not in self._times:
            path = path.rpartition(".")[0]
        return min(begin for begin, _ in self._times[path])

    def _finished(self, module: nn.Module, path: str, limit: int) -> Iterator[str]:
        times = self._times.get(path, [])
        if len(times) == 1 and times[0][1] < limit:
            yield path
            return
        for name, child in module.named_children():
            yield from self._finished(child, f"{path}.{name}" if path else name, limit)


def run_keeping(network: nn.Module, images: Tensor, wanted: Iterable[str]) -> tuple[dict[str, Any], Any]:
    """What the wanted modules returned in a forward pass, and what the network did."""
    kept: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, result: Any) -> None:
            kept[path] = _copied(result)

        return hook

    handles = [network.get_submodule(path).register_forward_hook(keep(path)) for path in wanted]
    try:
        result = network(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept, result


def reusing(network: nn.Module, kept: Mapping[str, Any]) -> None:
    """Let these modules of `network`, in place, give what is kept instead of computing it."""
    for path, value in kept.items():
        network.get_submodule(path).forward = _giving(value)  # type: ignore[method-assign]


def _giving(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: _copied(value)


def _copied(value: Any) -> Any:
    # What follows may change it in place.
    return tree_map_only(Tensor, lambda tensor: tensor.clone(), value)
