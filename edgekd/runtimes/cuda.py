"""Calls on an NVIDIA GPU: pinned host memory, copies, CUDA graphs, and events that tell compute from transfers.

torch brings streams, events, pinned memory and graphs and is here anyway; cuda-python would be one dependency more for
the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MissingExtra, StageError
from .session import Feed, Parts

if TYPE_CHECKING:
    import torch

__all__ = ["CudaCall", "need_cuda", "run_once"]

#: Calls before a graph is captured: lazy initialisation and the choice of kernels must be over.
#: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
WARM_UP = 3

Launch = Callable[[], "Mapping[str, torch.Tensor]"]


def need_cuda(what: str) -> torch.device:
    """The GPU that torch uses. Raises MissingExtra (a CPU build of torch) or StageError (no GPU, or no driver)."""
    import torch

    if torch.version.cuda is None:
        raise MissingExtra(
            f"{what} needs torch's CUDA build, and this is {torch.__version__}",
            hint="https://pytorch.org/get-started says how to install it; `edgekd doctor` looks at all runtimes",
        )
    if not torch.cuda.is_available():
        raise StageError(
            f"{what} needs an NVIDIA GPU, and torch {torch.__version__} sees none",
            hint="does nvidia-smi list one? in a container: was it started with --gpus all?",
        )
    return torch.device("cuda", torch.cuda.current_device())


def run_once(feed: Feed, inputs: Mapping[str, torch.Tensor], launch: Launch, stream: torch.cuda.Stream) -> Feed:
    """The outputs of one untimed call; see `CudaCall`."""
    import torch

    with torch.inference_mode(), torch.cuda.stream(stream):
        for name, array in feed.items():
            inputs[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        return {name: value.cpu().numpy() for name, value in launch().items()}


class CudaCall:
    """A `DeviceCall` on one stream: arrays of the host in, `launch`, arrays of the host out; returns when all is done.

    `inputs` are the device's tensors that `launch` reads; it returns the device's outputs by name. With `graph` it is
    captured once as a CUDA graph and replayed: kernels are then launched by one call of the host instead of one each.
    """

    def __init__(
        self,
        feed: Feed,
        inputs: Mapping[str, torch.Tensor],
        launch: Launch,
        stream: torch.cuda.Stream,
        *,
        graph: bool,
    ) -> None:
        import torch

        self._torch, self._stream = torch, stream
        self._copies = [(inputs[name], torch.from_numpy(array.copy()).pin_memory()) for name, array in feed.items()]
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        with torch.inference_mode(), torch.cuda.stream(stream):
            for device, host in self._copies:
                device.copy_(host)
            outputs = launch()
            for _ in range(WARM_UP - 1):
                outputs = launch()
            stream.synchronize()
            if graph:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=stream):
                    captured = launch()
                outputs = captured
            self._launch: Launch = self._replay if graph else launch
            self._captured = outputs
            self._results = {
                name: torch.empty_like(value, device="cpu").pin_memory() for name, value in outputs.items()
            }
        self()

    def _replay(self) -> Mapping[str, torch.Tensor]:
        self._graph.replay()
        return self._captured

    def __call__(self) -> None:
        begin, ready, done, end = self._events
        stream = self._stream
        with self._torch.inference_mode(), self._torch.cuda.stream(stream):
            begin.record(stream)
            for device, host in self._copies:
                device.copy_(host, non_blocking=True)
            ready.record(stream)
            outputs = self._launch()
            done.record(stream)
            for name, host in self._results.items():
                host.copy_(outputs[name], non_blocking=True)
            end.record(stream)
        stream.synchronize()

    def parts(self) -> Parts:
        begin, ready, done, end = self._events
        transfers = begin.elapsed_time(ready) + done.elapsed_time(end)
        return {"compute": ready.elapsed_time(done), "transfers": transfers}
