"""A network with fake quantization: prepare, calibrate, train, freeze, convert.

Built on torchao's PT2E (quantizer annotations, insertion of the fake-quantize modules, conversion to Q/DQ operators)
with placement, modules and handling of batch norm of our own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import UsageError, nearest
from .echoes import drop_echoes, restore_echoes
from .fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from .folding import fold_batch_norm
from .graph import MATRIX, attribute, layers, operation, set_training
from .integers import TRANSPOSED, fix_weight_scales, keep_float, pad_integers, quantize_biases
from .learned import LearnedPerChannelFakeQuantize
from .pt2e import convert_pt2e, insert_fake_quantization
from .quantizer import PlacingQuantizer
from .quiet import quiet
from .scheme import Scheme
from .soundness import check_ranges
from .tracing import trace

__all__ = ["Converted", "Prepared", "as_prepared", "convert", "enable_fake_quant", "floating", "freeze", "prepare"]


class Prepared(nn.Module):
    """A traced network with fake-quantize modules. forward: image [N, C, H, W] -> dict of logits and taps.

    train() and eval() switch batch norm, dropout and range tracking. Its state dict holds everything, the switches
    included: loaded into a fresh `prepare` of the same network it gives the same outputs, bit for bit.
    """

    frozen: Tensor

    def __init__(
        self, network: GraphModule, names: list[str], scheme: Scheme, qat: bool, float_layers: Collection[str]
    ) -> None:
        super().__init__()
        self.network = network
        self.names = names
        self.scheme, self.qat, self.float_layers = scheme, qat, frozenset(float_layers)
        self.register_buffer("frozen", torch.zeros(1, dtype=torch.uint8))
        self.register_load_state_dict_post_hook(_follow_switches)
        self.train()

    def train(self, mode: bool = True) -> Prepared:
        # torchao replaces the graph's own train() by one that raises, so the modules are switched one by one.
        for module in self.modules():
            module.training = mode
        set_training(self.network, mode, batch_norm=mode and not self.frozen.item())
        return self

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.network(image), strict=True))


def _follow_switches(module: nn.Module, _: object) -> None:
    """Let the modes of the layers follow a `frozen` switch that was just loaded."""
    module.train(module.training)


class Converted(nn.Module):
    """A network with integer weights and Q/DQ operators. forward: image [N, C, H, W] -> {"logits": [N, K]}."""

    def __init__(self, network: nn.Module, layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = network
        #: Module paths of what has a weight, in the order in which it runs.
        self.layers = list(layers)

    def train(self, mode: bool = True) -> Converted:
        self.training = False
        return self

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(image)[0]}


def prepare(
    network: nn.Module,
    example: Tensor,
    scheme: Scheme,
    *,
    qat: bool,
    float_layers: Collection[str] = (),
    learned: bool = False,
) -> nn.Module:
    """A copy of `network` with fake quantization where `scheme` wants it, in training mode.

    network: returns logits [N, K] or a dict with "logits" and tapped features; example: [N, C, H, W] float.
    qat: keep batch norm as a layer that trains; otherwise it is folded into the convolutions at once.
    float_layers: module paths that stay float, with all that lies below them; of a network that is wrapped to tap
    features, the paths inside.
    learned: the scales are parameters that train (LSQ) from where `calibrate` put them; else ranges are observed, and
    quantizing starts when `calibrate` or a training step has set them. Raises StageError for networks that
    torch.export cannot follow, naming the line, and UsageError for a path that the network does not have.
    """
    device = example.device
    _check_paths(network, float_layers)
    traced, names = trace(network, example)
    if not qat:
        fold_batch_norm(traced)
    quantizer = PlacingQuantizer(scheme, float_layers, learned)
    quantizer.annotate(traced)
    with quiet():
        # Not prepare_qat_pt2e: it rewrites convolution and batch norm for per-tensor weights, assumes PyTorch's
        # default epsilon and momentum, and divides by gamma, which residual networks initialise with 0.
        graph = insert_fake_quantization(traced, {}, is_qat=qat)
    _name_once(graph)
    drop_echoes(graph)
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, LearnedPerChannelFakeQuantize):
            module.learn(attribute(graph, node.args[0]))
    return Prepared(graph, names, scheme, qat, float_layers).to(device)


def enable_fake_quant(prepared: nn.Module, weights: bool = True, activations: bool = True) -> None:
    """Switch quantizing on or off. Ranges are tracked either way, so training may begin with it off, or with weights
    alone; learned scales learn only while they are in use."""
    for module in as_prepared(prepared).modules():
        if isinstance(module, ActivationFakeQuantize):
            module.enable_fake_quant(activations)
        elif isinstance(module, WeightPerChannelFakeQuantize):
            module.enable_fake_quant(weights)


def freeze(prepared: nn.Module, batch_norm: bool = True) -> None:
    """Fix the activations' ranges and, with `batch_norm`, its statistics for the rest of the training.

    For its last part: the network then trains with the very numbers it will be deployed with (Krishnamoorthi 2018,
    "Quantizing deep convolutional networks for efficient inference", section 3.2.2).
    """
    network = as_prepared(prepared)
    for module in network.modules():
        if isinstance(module, ActivationFakeQuantize):
            module.disable_observer()
    if batch_norm:
        network.frozen.fill_(1)
    network.train(network.training)


@contextlib.contextmanager
def floating(prepared: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode and nothing in it is quantized; its modes and switches come back."""
    network = as_prepared(prepared)
    kinds = ActivationFakeQuantize | WeightPerChannelFakeQuantize
    before = {module: module.quantizes for module in network.modules() if isinstance(module, kinds)}
    training = network.training
    try:
        for module in before:
            module.quantizes = False
        network.eval()
        yield
    finally:
        for module, quantizes in before.items():
            module.quantizes = quantizes
        network.train(training)


def convert(prepared: nn.Module) -> nn.Module:
    """A network of integer weights and Q/DQ operators that returns {"logits": [N, K]}; `prepared` stays usable.

    Batch norm is folded, dropout and taps are gone. Raises StageError when a range was never set, or is not finite.
    """
    network = copy.deepcopy(as_prepared(prepared))
    network.eval()
    graph = network.network
    output = graph.graph.output_node()
    logits = output.args[0][network.names.index("logits")]  # type: ignore[index,union-attr]
    output.args = ((logits,),)  # type: ignore[assignment]
    for node in list(graph.graph.nodes):
        if operation(node) in {"dropout", "alpha_dropout", "feature_dropout"}:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            # By hand: being random, it does not count as dead code.
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    check_ranges(graph, alive=False)
    fold_batch_norm(graph)
    restore_echoes(graph)
    fix_weight_scales(graph)
    weighted = [node for node in graph.graph.nodes if operation(node) in MATRIX | TRANSPOSED]
    paths = [(layers(node) or ("",))[-1] for node in weighted]
    with quiet():
        converted = convert_pt2e(graph)
    pad_integers(converted)
    if network.scheme.placement == "onnxruntime":
        quantize_biases(converted)
        keep_float(converted)
    return Converted(converted, paths)


def _check_paths(network: nn.Module, float_layers: Collection[str]) -> None:
    inner = getattr(network, "network", network) if hasattr(network, "taps") else network
    known = [path for path, _ in inner.named_modules(remove_duplicate=False) if path]
    for path in float_layers:
        if path not in known:
            raise UsageError(f"the network has no module {path!r}", where="float_layers", hint=nearest(path, known))


def as_prepared(module: nn.Module) -> Prepared:
    if not isinstance(module, Prepared):
        raise TypeError(f"expected what prepare() returns, got {type(module).__name__}")
    return module


def _name_once(graph: GraphModule) -> None:
    """One name for each shared module: safetensors refuses tensors that are stored under two."""
    first: dict[nn.Module, str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            module = graph.get_submodule(name)
            node.target = first.setdefault(module, name)
    for name, module in list(graph.named_modules(remove_duplicate=False)):
        if first.get(module, name) != name:
            graph.delete_submodule(name)
    graph.recompile()
