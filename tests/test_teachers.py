"""Teacher sources: a network that answers anew, and one whose answers are stored and replayed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd.data import Dataset, Split, augmentations, batches
from edgekd.errors import RecipeError, StageError, UsageError
from edgekd.learner import Learner
from edgekd.models import Tapped
from edgekd.recipe import Component, DataSpec, Training
from edgekd.registry import bind
from edgekd.tasks import Classification
from edgekd.teachers import FILLED_IN, Cached, Frozen, cached
from edgekd.train import Job, fit

SPEC = DataSpec.model_validate({"use": "digits", "augment": [{"use": "crop-flip", "pad": 1}, "random-erasing"]})
IMAGES, LABELS = load_digits(return_X_y=True)
KEY = {"teacher": "t", "data": "d"}
SPLIT = Split(
    torch.from_numpy(IMAGES[:90] * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8),
    torch.from_numpy(LABELS[:90]).long(),
)


def network(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10)
    )
    with torch.no_grad():
        made[-1].weight *= scale  # type: ignore[operator]
    return made


def stream(view: int | None, epoch: int = 0, shuffle: bool = False) -> Iterator[dict[str, Any]]:
    return batches(
        SPLIT,
        batch=32,
        mean=[0.3],
        std=[0.35],
        seed=7,
        epoch=epoch,
        view=view,
        augment=augmentations(SPEC),
        shuffle=shuffle,
    )


def filled(directory: Path, views: int = 2, scale: float = 1.0) -> Cached:
    source = Cached([Tapped(network(scale))], views)
    source.fill(directory, stream, 90, lambda done, total: None, KEY)
    return source


def no_network(source: Cached) -> Cached:
    """The same source, whose network must not be asked any more."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    source.inner.register_forward_pre_hook(refuse)
    return source


def test_frozen_answers_every_batch_anew_without_gradient_and_in_evaluation_mode() -> None:
    bare = network()
    source = Frozen(Tapped(bare, ["0"])).train()
    batch = next(stream(0))
    found = source(batch, [{}, {}])
    assert len(found) == 2
    assert found[0]["0"].shape == (32, 4, 6, 6)
    assert not found[0]["logits"].requires_grad
    assert not any(p.requires_grad for p in source.parameters())
    torch.testing.assert_close(found[1]["logits"], bare.eval()(batch["image"]), rtol=1e-5, atol=1e-5)
    assert bare[1].num_batches_tracked == 0  # type: ignore[index,union-attr]


def test_replayed_logits_are_the_networks_answers_to_the_same_view(tmp_path: Path) -> None:
    source = no_network(filled(tmp_path, views=2))
    live = Frozen(Tapped(network()))
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for epoch in range(4):
        view = epoch % 2
        for batch in stream(view, epoch, shuffle=True):
            [expected], [found] = live(batch, [{}]), source(batch, [{}])
            assert list(found) == ["logits"]
            assert found["logits"].dtype == torch.float32
            torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-3, atol=1e-3)
            seen[view].append(found["logits"])
    assert not torch.allclose(torch.cat(seen[0]).sort(0)[0], torch.cat(seen[1]).sort(0)[0], atol=1e-2)


def test_one_file_per_view_in_half_precision(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    source = Cached([Tapped(network())], 3)
    source.fill(tmp_path / "new" / "cache", stream, 90, lambda done, total: told.append((done, total)), KEY)
    files = sorted((tmp_path / "new" / "cache").glob("view*"))
    assert [file.name for file in files] == ["view-000.npy", "view-001.npy", "view-002.npy"]
    rows = [np.load(file, allow_pickle=False) for file in files]
    assert [(r.shape, r.dtype) for r in rows] == [((90, 10), np.float16)] * 3
    assert told[0] == (32, 270)
    assert told[-1] == (270, 270)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    again = no_network(Cached([Tapped(network())], 2))
    again.fill(tmp_path, stream, 90, lambda done, total: None, KEY)
    (tmp_path / "view-000.npy").unlink()
    asked: list[int] = []

    def counted(view: int) -> Iterator[dict[str, Any]]:
        asked.append(view)
        return stream(view)

    more = Cached([Tapped(network())], 4)
    more.fill(tmp_path, counted, 90, lambda done, total: None, KEY)
    assert asked == [0, 2, 3]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.flatten(1))


class Repeating(Frozen):
    """A live teacher for which the loop repeats its views, as it does for a cached one."""

    views = 2


def test_training_from_a_cache_is_training_from_the_network(tmp_path: Path) -> None:
    data = Dataset(SPLIT, SPLIT, SPLIT, [str(d) for d in range(10)], [0.3], [0.35], "digits")
    students = {}
    for name, source in (("live", Repeating), ("cached", partial(Cached, views=2))):
        torch.manual_seed(0)
        students[name] = Small()
        made = Learner.of(
            students[name], objectives=["kl"], teacher=network(), example=torch.zeros(2, 1, 8, 8), source=source
        )
        if isinstance(made.source, Cached):
            made.source.fill(tmp_path / "cache", stream, 90, lambda done, total: None, KEY)
            no_network(made.source)
        shown: list[int] = []
        made.register_forward_pre_hook(lambda _, inputs, shown=shown: shown.append(inputs[0]["view"]))
        settings = Training(epochs=4, precision="fp32", keep="last", lr=0.05)
        fit(made, Job(name, data, Classification(), settings, 32, augmentations(SPEC), 7, tmp_path / name))
        assert shown == [0, 0, 1, 1, 0, 0, 1, 1]
    torch.manual_seed(0)
    assert (Small().head.weight - students["live"].head.weight).abs().max() > 0.02
    torch.testing.assert_close(students["cached"].head.weight, students["live"].head.weight, rtol=0, atol=1e-4)


def test_before_it_is_filled_the_network_answers() -> None:
    batch = next(stream(0))
    [found] = Cached([Tapped(network())])(batch, [{}])
    torch.testing.assert_close(found["logits"], network().eval()(batch["image"]), rtol=1e-5, atol=1e-5)


def test_features_are_refused() -> None:
    with pytest.raises(UsageError, match="this teacher source gives logits only, not '0'") as raised:
        Learner.of(
            network(),
            objectives=["kl", {"use": "hint", "student": "0", "teacher": "0"}],
            teacher=network(),
            example=torch.zeros(2, 1, 8, 8),
            source=Cached,
        )
    assert raised.value.problem.where == "objectives[1].teacher"
    assert "source = 'frozen'" in (raised.value.problem.hint or "")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def noise(file: Path) -> None:
    file.write_bytes(b"noise" * 100)


def fewer(file: Path) -> None:
    np.save(file, np.zeros((89, 10), np.float16))


def pickled(file: Path) -> None:
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)


def gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [cut, empty, noise, fewer, pickled])
def test_a_damaged_file_is_told_when_the_cache_is_opened(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    filled(tmp_path)
    damage(tmp_path / "view-000.npy")
    with pytest.raises(StageError, match="the teacher cache") as raised:
        filled(tmp_path)
    assert raised.value.problem.where == str(tmp_path / "view-000.npy")
    assert raised.value.problem.hint == "delete it: it is computed again"
    (tmp_path / "view-000.npy").unlink()
    filled(tmp_path)


@pytest.mark.parametrize("damage", [cut, empty, noise, fewer, pickled, gone])
def test_a_later_view_is_looked_at_when_it_is_shown(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    source = filled(tmp_path)
    damage(tmp_path / "view-001.npy")
    source(next(stream(0)), [{}])
    with pytest.raises(StageError, match="the teacher cache"):
        source(next(stream(1)), [{}])


@pytest.mark.parametrize("scale", [1e7, float("nan")])
def test_logits_that_half_precision_cannot_hold_are_refused(tmp_path: Path, scale: float) -> None:
    with pytest.raises(StageError, match="not finite in half precision"):
        filled(tmp_path, scale=scale)
    assert not list(tmp_path.glob("*.npy"))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cached, "write_atomically", refuse)
    with pytest.raises(StageError, match="cannot write the teacher cache: No space left on device"):
        filled(tmp_path)


def test_views_are_a_positive_number() -> None:
    component, args, problems = bind("teachers", "cached", {}, "source", skip=FILLED_IN)
    assert (component, args, problems) == (
        Cached,
        {"views": 8, "top": None, "of": Component(use="frozen"), "directory": None},
        [],
    )
    _, _, problems = bind("teachers", "cached", {"views": 0}, "source", skip=FILLED_IN)
    with pytest.raises(RecipeError, match=r"source.views: input should be greater than 0, got 0"):
        raise RecipeError(problems)
