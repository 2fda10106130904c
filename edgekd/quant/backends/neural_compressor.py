"""Intel Neural Compressor's static quantization (its PT2E path), plain or tuned until accuracy is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...errors import StageError
from ..graph import MATRIX, operation
from ..quiet import quiet
from ..tracing import trace

__all__ = ["METHODS", "quantize", "tune"]

#: A stage's `ranges` -> Neural Compressor's `act_algo`. What it calls "kl" is PyTorch's HistogramObserver, which looks
#: for the range of least squared error.
METHODS = {"min-max": "minmax", "mse": "kl"}
DROPOUTS = {"dropout", "alpha_dropout", "feature_dropout"}


def quantize(network: nn.Module, example: Tensor, batches: Sequence[Tensor], ranges: str = "min-max") -> nn.Module:
    """`network` with integer weights and Q/DQ operators where X86InductorQuantizer places them.

    example: [N, C, H, W]; batches: images that set the ranges. The result returns {"logits": [N, K]}.
    Raises StageError for networks that cannot be traced or that Neural Compressor fails on.
    """
    traced = _traced(network, example)
    try:
        with quiet():
            from neural_compressor.torch.quantization import INT8StaticQuantConfig, convert, prepare

            from ..prepared import Converted  # torchao takes seconds to import

            prepared = prepare(traced, INT8StaticQuantConfig(act_algo=METHODS[ranges]))
            _feed(prepared, batches)
            return Converted(convert(prepared))
    except Exception as error:
        raise _failed(error) from error


def tune(
    network: nn.Module,
    example: Tensor,
    batches: Sequence[Tensor],
    accuracy: Callable[[nn.Module], float],
    max_drop: float,
) -> tuple[nn.Module, dict[str, Any]]:
    """Neural Compressor's `autotune`: the first configuration that loses at most `max_drop` of `accuracy`, else the
    best one.

    `accuracy` (0..1) is asked with networks that return {"logits": [N, K]}. Tried in turn: ranges by extremes, by least
    squared error, then with the first and the last matrix layer, and with all linear layers, left in float.
    Returns the network and a record of the float accuracy, every trial's, which was taken, and whether it is enough.
    """
    from ..prepared import Converted

    traced = _traced(network, example)
    first, last = _ends(traced)
    found: list[float] = []

    def judged(candidate: nn.Module) -> float:
        found.append(accuracy(Converted(candidate)))
        return found[-1]

    try:
        with quiet():
            from neural_compressor.torch.quantization import INT8StaticQuantConfig, TuningConfig, autotune

            floating = INT8StaticQuantConfig(w_dtype="fp32", act_dtype="fp32")
            configs = [INT8StaticQuantConfig(act_algo=algorithm) for algorithm in ("minmax", "kl", "kl", "kl")]
            configs[2].set_local([first, last], floating)
            configs[3].set_local(nn.Linear, floating)
            before = accuracy(Converted(traced))
            # Its own bound is a share of the float accuracy.
            tuning = TuningConfig(config_set=configs, tolerable_loss=max_drop / max(before, 1e-9))
            tuned = autotune(traced, tuning, judged, run_fn=lambda model: _feed(model, batches))
    except Exception as error:
        raise _failed(error) from error
    trials = found[1:]  # the first is the float network's
    best = max(range(len(trials)), key=lambda i: trials[i])
    ends = " and ".join(path.removeprefix("network.") for path in (first, last))
    names = ["min-max", "mse", f"mse, {ends} in float", "mse, linear layers in float"]
    record = {
        "max_drop": max_drop,
        "float": before,
        "trials": dict(zip(names, trials, strict=False)),
        "taken": names[best],
        "reached": before - trials[best] <= max_drop,
    }
    return Converted(tuned), record


def _traced(network: nn.Module, example: Tensor) -> GraphModule:
    """What Neural Compressor's own `export` would return, by edgekd's tracer, which tells where a network fails."""
    traced, names = trace(network, example)
    output = traced.graph.output_node()
    output.args = ((output.args[0][names.index("logits")],),)  # type: ignore[index,union-attr]
    for node in [n for n in traced.graph.nodes if operation(n) in DROPOUTS]:
        node.replace_all_uses_with(node.args[0])
        traced.graph.erase_node(node)  # by hand: being random, it does not count as dead code
    traced.graph.eliminate_dead_code()
    traced.recompile()
    vars(traced)["_exported"] = True
    vars(traced)["dynamic_shapes"] = None
    return traced


def _feed(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


def _ends(traced: GraphModule) -> tuple[str, str]:
    """The module paths, as Neural Compressor names them, of the first and the last matrix layer."""
    paths = []
    for node in traced.graph.nodes:
        if operation(node) in MATRIX:
            path, _ = list(node.meta["nn_module_stack"].values())[-1]
            paths.append(path.removeprefix("L['self']."))
    return paths[0], paths[-1]


def _failed(error: Exception) -> StageError:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return StageError(
        f"Neural Compressor cannot quantize this network: {first}",
        where="quantize.backend",
        hint='backend = "edgekd" quantizes it by other means',
    )
