from __future__ import annotations

import argparse

import pytest
import safetensors.torch
import torch
from torch import nn

from edgekd.errors import UsageError
from edgekd.models import load_weights


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


def state(source: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + key: value.clone() for key, value in source.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".th", ".bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_every_format_and_common_prefix(suffix: str, prefix: str, tmp_path) -> None:
    source, target = net(), net()
    if suffix == ".safetensors":
        safetensors.torch.save_file(state(source, prefix), tmp_path / f"w{suffix}")
    else:
        torch.save(state(source, prefix), tmp_path / f"w{suffix}")
    load_weights(target, tmp_path / f"w{suffix}")
    assert same(source, target)


def test_a_prefix_that_belongs_to_the_network_is_kept(tmp_path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

    source, target = Wrapped(), Wrapped()
    torch.save(state(source, "module."), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "state_dict_ema", "model_state_dict"])
def test_wrapped_state_dicts(wrapper: str, tmp_path) -> None:
    source, target = net(), net()
    torch.save({wrapper: state(source), "epoch": 3, "best": 0.9}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


def test_averaged_weights_come_first(tmp_path) -> None:
    source, target = net(), net()
    torch.save({"state_dict": state(net()), "state_dict_ema": state(source)}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


def test_given_prefixes(tmp_path) -> None:
    source, target = net(), net()
    torch.save({**state(source, "student."), **state(net(), "teacher.")}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt", prefix="student.")
    assert same(source, target)

    renamed = {k.replace("0.", "stem.").replace("3.", "head.fc."): v for k, v in state(source).items()}
    torch.save(renamed, tmp_path / "r.pt")
    target = net()
    load_weights(target, tmp_path / "r.pt", prefix={"stem.": "0.", "head.fc.": "3."})
    assert same(source, target)
    nested = {"old." + k if k.startswith("0.") else "old.deep." + k: v for k, v in state(source).items()}
    torch.save(nested, tmp_path / "n.pt")
    target = net()
    load_weights(target, tmp_path / "n.pt", prefix={"old.": "", "old.deep.": ""})  # the longest beginning counts
    assert same(source, target)
    with pytest.raises(UsageError, match=r"two tensors the name '0\.weight'"):
        load_weights(target, tmp_path / "r.pt", prefix={"stem.": "0.", "1.": "0."})


def test_half_precision_is_cast_and_old_files_lack_the_batch_counter(tmp_path) -> None:
    source, target = net(), net()
    half = {k: v.half() for k, v in state(source).items() if not k.endswith("num_batches_tracked")}
    torch.save(half, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, half["0.weight"].float())


def test_keys_that_do_not_fit_are_all_named(tmp_path) -> None:
    wrong = state(net())
    wrong["3.weight"] = torch.zeros(5, 3)
    wrong["extra.bias"] = wrong.pop("0.bias")
    torch.save(wrong, tmp_path / "w.pt")
    target = net()
    before = state(target)
    with pytest.raises(UsageError) as caught:
        load_weights(target, tmp_path / "w.pt", where="teacher.weights")
    text = str(caught.value)
    assert "7 of the network's 9 tensors fit" in text
    assert "1 missing: 0.bias" in text
    assert "1 unexpected: extra.bias" in text
    assert "1 wrong shape: 3.weight found [5, 3] expected [2, 3]" in text
    assert "teacher.weights" in text
    assert "w.pt" in text
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())  # nothing was half loaded


def test_long_lists_are_cut_and_counted(tmp_path) -> None:
    torch.save({f"x{i}.weight": torch.zeros(1) for i in range(20)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"20 unexpected: x0.weight.*x7.weight, and 12 more") as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert "x8" not in str(caught.value)
    assert "prefix" in str(caught.value.problem.hint)


def test_missing_unknown_and_empty_files(tmp_path) -> None:
    with pytest.raises(UsageError, match="no such weights file"):
        load_weights(net(), tmp_path / "none.pt")
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"unknown kind of weights file '\.h5'"):
        load_weights(net(), tmp_path / "w.h5")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"holds no state dict.*epoch"):
        load_weights(net(), tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds no state dict, but list"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.98])
def test_truncated_files(suffix: str, share: float, tmp_path) -> None:
    file = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(state(net(64)), file)
    else:
        safetensors.torch.save_file(state(net(64)), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError, match="truncated or corrupted"):
        load_weights(net(64), file)


def test_corrupted_bytes_and_legacy_files(tmp_path) -> None:
    (tmp_path / "w.pt").write_bytes(b"<html>404: Not Found</html>")
    with pytest.raises(UsageError, match="truncated or corrupted"):
        load_weights(net(), tmp_path / "w.pt")
    source, target = net(), net()
    torch.save(state(source), tmp_path / "old.th", _use_new_zipfile_serialization=False)
    load_weights(target, tmp_path / "old.th")
    assert same(source, target)
    content = (tmp_path / "old.th").read_bytes()
    (tmp_path / "old.th").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="truncated or corrupted"):
        load_weights(net(), tmp_path / "old.th")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from a pickle was run')",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": {}, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        ({"x": Evil()}, "exec"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_python_objects_are_refused_and_named(content: object, named: str, tmp_path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="refused") as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert named in str(caught.value)
    assert "safetensors" in str(caught.value.problem.hint)
