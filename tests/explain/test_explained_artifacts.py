"""`edgekd show ARTIFACT`: quantized networks layer by layer, and what pruning and mixed precision decided."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd import quant
from edgekd.explain import plan_text, precision_text
from edgekd.explain.document import Explanation
from edgekd.explain.network import output_sqnr
from edgekd.quant import SCHEMES, calibrate, enable_fake_quant, prepare

Call = Callable[..., Any]
PATHS = ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)), "linear"]


class Small(nn.Module):
    """One convolution with batch norm and ReLU, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(image)).relu().flatten(1))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(load_digits().images[:200]).float().unsqueeze(1) / 16


@pytest.fixture(scope="module")
def network(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    network = Small()
    with torch.no_grad():
        for _ in range(20):
            network.norm(network.conv(images))
    return network.eval()


def db(reference: Tensor, found: Tensor) -> float:
    r, f = reference.detach().double().numpy(), found.detach().double().numpy()
    return float(20 * np.log10(np.linalg.norm(r) / np.linalg.norm(r - f)))


def rounded(x: Tensor, quantizer: Any) -> Tensor:
    """The integers of a scale and zero point, and back."""
    integers = (x / quantizer.scale).round() + quantizer.zero_point
    return (integers.clamp(0, 255) - quantizer.zero_point) * quantizer.scale


@pytest.mark.parametrize("qat", [False, True])
def test_errors_of_outputs_against_integers_by_hand(qat: bool, network: Any, images: Tensor) -> None:
    prepared = prepare(network, images[:8], SCHEMES["x86-u8s8"], qat=qat)
    calibrate(prepared, images.split(100))
    enable_fake_quant(prepared)
    prepared.eval()
    placed = quant.placements(prepared)
    assert [p.path for p in placed] == ["conv", "head"]
    found = output_sqnr(prepared, [p.node for p in placed], images)

    activations = [m for m in prepared.modules() if type(m).__name__ == "ActivationFakeQuantize"]
    with torch.no_grad():
        # Folding first or last gives the same: scales are per channel.
        factor = network.norm.weight / (network.norm.running_var + network.norm.eps).sqrt()
        weight = network.conv.weight * factor.reshape(-1, 1, 1, 1)
        bias = (network.conv.bias - network.norm.running_mean) * factor + network.norm.bias
        reference = F.conv2d(images, weight, bias).relu()
        scale = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
        made = F.conv2d(rounded(images, activations[0]), (weight / scale).round() * scale, bias).relu()
        hidden = rounded(made, activations[1])
        scale = network.head.weight.abs().amax(dim=1, keepdim=True) / 127
        logits = F.linear(hidden.flatten(1), (network.head.weight / scale).round() * scale, network.head.bias)
    assert found[placed[0].node] == pytest.approx(db(reference, hidden), abs=0.1)
    assert found[placed[1].node] == pytest.approx(db(network(images), logits), abs=0.1)
    # The switches are as they were.
    assert torch.equal(prepared(images)["logits"], prepared(images)["logits"])
    assert all(m.quantizes for m in activations)


def test_a_quantized_artifact_layer_by_layer(finished: Any, edgekd: Call) -> None:
    artifact = next(finished.directory.glob("03-quantize-*"))
    done = edgekd("show", str(artifact), "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["version"], document["manifest"]["kind"]) == (1, "quantize")
    explanation = Explanation.model_validate(document["explanation"])
    assert [row.path for row in explanation.layers] == PATHS
    for row in explanation.layers:
        assert row.runs == "int8"
        assert row.stored_input is not None
        assert row.stored_input.low is not None
        assert row.output_sqnr_db is not None
        assert row.weight_sqnr_db is not None
        assert 35 < row.weight_sqnr_db < 60
        assert row.ms is not None
        assert row.float_ms is not None
    assert explanation.summary.float_parent_ms is not None
    text = document["text"]
    assert max(map(len, text[text.index("\nlayer ") :].splitlines())) <= 100
    assert "against the same weights unquantized" in text
    exported = next(finished.directory.glob("04-export-*/model.onnx"))
    file = Explanation.model_validate(json.loads(edgekd("show", str(exported), "--json").out)["explanation"])
    assert [row.path for row in file.layers] == PATHS
    assert all(row.float_ms is not None for row in file.layers)  # the float parent is found by itself
    known = [row.output_sqnr_db for row in explanation.layers]
    assert [row.output_sqnr_db for row in file.layers] == pytest.approx(known)


def test_an_artifact_alone_says_what_is_not_known(finished: Any, edgekd: Call, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(next(finished.directory.glob("03-quantize-*")), alone)
    done = edgekd("show", str(alone), "--json")
    assert done.code == 0, done.err
    explanation = Explanation.model_validate(json.loads(done.out)["explanation"])
    assert [row.path for row in explanation.layers] == PATHS
    assert all(row.output_sqnr_db is None and row.float_ms is None for row in explanation.layers)
    assert all(row.weight_sqnr_db is not None and row.ms is not None for row in explanation.layers)
    assert "give --recipe FILE" in explanation.notes[0]
    assert list(tmp_path.iterdir()) == [alone]  # nothing is left behind
    done = edgekd("show", str(alone), "--against", "float.onnx")
    assert done.code == 2
    assert "--against: artifacts know their float network" in done.err


def plan(**more: Any) -> dict[str, Any]:
    group = {"layers": [], "channels_before": 16, "channels_after": 8, "removed": [0], "attributes": {}}
    kept = {**group, "channels_after": 16, "removed": []}
    return {
        "target": {"macs": 0.5},
        "groups": [
            {**group, "name": "a.conv", "saved": 1500.0, "harm": 0.0123, "importance_removed_share": 0.25},
            {**kept, "name": "b.conv", "reason_kept": "protected by 'b.*'"},
            {**kept, "name": "c.conv", "reason_kept": "protected by 'b.*'"},
        ],
        "macs_before": 2_000_000,
        "macs_after": 1_000_000,
        "parameters_before": 1000,
        "parameters_after": 600,
        **more,
    }


def test_a_plan_group_by_group() -> None:
    lines = plan_text(plan()).splitlines()
    assert lines[0].split() == ["group", "channels", "gone", "saves", "MACs", "harm", "nats", "importance", "%", "kept"]
    assert lines[1].split() == ["a.conv", "16", "->", "8", "50", "%", "1.5k", "0.012", "25.0"]
    assert lines[2].split() == ["b.conv", "16", "->", "16", "a"]
    assert lines[3].split() == ["c.conv", "16", "->", "16", "a"]
    assert lines[4] == "  a  protected by 'b.*'"
    assert "MACs     2M -> 1M, 50.0 % remain" in lines
    assert "params   1k -> 600, 60.0 % remain" in lines


def test_a_plan_for_latency_has_what_was_predicted_and_what_was_measured() -> None:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    made = plan(
        target={"latency": {"speedup": 2.0}},
        blocks=[
            {
                "name": "layer1.1",
                "removed": True,
                "saved": 0.05,
                "saved_measured": {"value": 0.04, "low": 0.039, "high": 0.041},
                "harm": 0.2,
                "reason_kept": None,
            },
            {
                "name": "layer2.1",
                "removed": False,
                "saved": 0.0,
                "harm": 0.5,
                "reason_kept": "costs more than it saves",
            },
        ],
        latency={
            "profile": "cpu-x86",
            "precision": "int8",
            "wanted_speedup": 2.0,
            "predicted_ms_before": 1.0,
            "predicted_ms_after": 0.5,
            "rounds": 9,
            "busy": 1.26,
            "device": "a processor",
            "runtime": "onnxruntime 1.2.3",
            "threads": 2,
            "measured_ms_before": interval(1.1),
            "measured_ms_after": interval(0.6),
            "speedup": interval(1.83),
        },
        harm=0.3,
    )
    made["groups"][2] |= {"channels_after": 0, "reason_kept": None, "block": "layer1.1"}
    text = plan_text(made)
    assert "saves ms" in text
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["layer1.1", "block", "0.0500", "0.0400", "±0.0010", "0.2"],
        ["layer2.1", "0.5", "a"],
    ]
    assert "         measured: the same, of the two networks as a whole, before healing" in text
    assert "went with the block layer1.1" in text
    assert "latency  predicted 1.0000 -> 0.5000 ms on cpu-x86, int8" in text
    assert "         measured  1.1000 [1.0000, 1.2000] -> 0.6000 [0.5000, 0.7000] ms" in text
    assert "         speed-up  1.83x [1.73, 1.93], wanted 2.00x" in text
    assert "         9 rounds, onnxruntime 1.2.3, 2 threads, a processor\n" in text
    assert "         other programs kept 1.3 cores busy meanwhile\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_network_that_stayed_float_says_why() -> None:
    record = {
        "scheme": "x86-u8s8",
        "kept_float": "int8 is slower and less accurate",
        "measured": {
            "profile": "cpu-x86",
            "float_ms": 1.0,
            "own_ms": 1.25,
            "speedup": {"value": 0.8, "low": 0.78, "high": 0.82},
            "metric": "accuracy",
            "float_metric": 0.91,
            "own_metric": 0.9,
            "images": 500,
            "split": "validation images",
        },
        "layers": [
            {"path": "a", "precision": "float", "reason": "int8 loses time", "harm": 0.001, "gain": -0.02},
            {"path": "b", "precision": "int8", "reason": "", "harm": None, "gain": None},
        ],
    }
    lines = precision_text(record).splitlines()
    assert lines[0] == "decided  the network stays float: int8 is slower and less accurate"
    assert lines[1] == "measured float 1.0000 ms, quantized 1.2500 ms on cpu-x86: 0.80x [0.78, 0.82]"
    assert lines[2].split() == ["accuracy", "0.9100", "->", "0.9000", "on", "500", "validation", "images"]
    assert lines[5].split() == ["a", "float", "0.001", "-2.0", "a"]
    assert lines[6].split() == ["b", "int8"]
    assert lines[7] == "  a  int8 loses time"
