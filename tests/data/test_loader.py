"""Batches: order, resumption, views, normalisation, mixtures; against independent NumPy references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from edgekd.data import Split, augmentations, batches, load, loader_speed
from edgekd.data.augment import CropFlip, Flip, RandomErasing
from edgekd.data.mixtures import CutMix, Mixup
from edgekd.recipe import DataSpec

MEAN, STD = [0.2, 0.3, 0.4], [0.5, 0.6, 0.7]


@pytest.fixture(scope="module")
def split() -> Split:
    return load(DataSpec(use="digits", size=12), seed=0).train.take(torch.arange(150))


def epoch(split: Split, **changed: object) -> list[dict]:
    settings = {"batch": 32, "mean": MEAN, "std": STD, "seed": 3, "epoch": 1, **changed}
    return list(batches(split, **settings))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def by_row(made: list[dict]) -> torch.Tensor:
    images, rows = torch.cat([b["image"] for b in made]), torch.cat([b["index"] for b in made])
    return images[rows.argsort()]


ALL = [CropFlip(2), RandomErasing(), Mixup(), CutMix()]


def test_one_epoch_shows_every_row_once_with_its_label(split):
    made = epoch(split)
    rows = torch.cat([b["index"] for b in made])
    assert [len(b["index"]) for b in made] == [32, 32, 32, 32, 22]
    assert sorted(rows.tolist()) == list(range(150))
    assert rows.tolist() != list(range(150))
    assert torch.equal(torch.cat([b["label"] for b in made]), split.labels[rows])
    assert [len(b["index"]) for b in epoch(split, drop_last=True)] == [32] * 4
    assert torch.cat([b["index"] for b in epoch(split, shuffle=False)]).tolist() == list(range(150))


@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_starting_at_a_step_equals_the_tail_of_the_epoch(split, start):
    full = epoch(split, augment=ALL, classes=10)
    tail = epoch(split, augment=ALL, classes=10, start=start)
    assert len(tail) == 5 - start
    assert all(same(a, b) for a, b in zip(full[start:], tail, strict=True))


def test_epochs_and_seeds_differ_in_order_crops_and_mixtures(split):
    base = epoch(split, augment=[CropFlip(2)])
    for changed in ({"epoch": 2}, {"seed": 4}):
        other = epoch(split, augment=[CropFlip(2)], **changed)
        assert not torch.equal(base[0]["index"], other[0]["index"])
        assert not torch.equal(by_row(base), by_row(other))
    targets = [epoch(split, augment=[Mixup()], classes=10, shuffle=False, epoch=e)[0]["target"] for e in (0, 1)]
    assert not torch.equal(*targets)
    steps = epoch(split, augment=[Mixup(1.0)], classes=10)
    largest = [round(float(torch.where(b["target"] < 0.999, b["target"], 0.0).max()), 4) for b in steps]
    assert len(set(largest)) == len(steps)  # every step draws its own share


def test_a_view_is_the_same_in_every_epoch_and_order(split):
    views = [CropFlip(2), RandomErasing(1.0)]
    first, again = (epoch(split, augment=views, epoch=e, view=7) for e in (1, 9))
    assert {b["view"] for b in first + again} == {7}
    assert not torch.equal(first[0]["index"], again[0]["index"])
    assert torch.equal(by_row(first), by_row(again))
    assert torch.equal(by_row(first), by_row(epoch(split, augment=views, view=7, shuffle=False, batch=150)))
    assert not torch.equal(by_row(first), by_row(epoch(split, augment=views, view=8)))
    assert torch.equal(by_row(epoch(split, augment=views)), by_row(epoch(split, augment=views, view=1)))


@pytest.mark.parametrize("as_float", [False, True])
def test_normalisation_against_numpy(split, as_float):
    pixels = split.images.numpy().astype(np.float64) / 255
    data = Split((split.images / 255) if as_float else split.images, split.labels)
    before = data.images.clone()
    image = epoch(data, shuffle=False, batch=150)[0]["image"]
    wanted = (pixels - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert image.dtype == torch.float32
    assert np.abs(image.numpy() - wanted).max() < 1e-6
    assert torch.equal(before, data.images)


@pytest.mark.parametrize("augment", [[], [CropFlip()], [RandomErasing()], [Mixup()], [CutMix()]])
def test_channels_last_changes_the_layout_and_no_value(split, augment):
    plain = epoch(split, augment=augment, classes=10)
    laid = epoch(split, augment=augment, classes=10, channels_last=True)
    assert all(b["image"].is_contiguous(memory_format=torch.channels_last) for b in laid)
    assert all(same(a, b) for a, b in zip(plain, laid, strict=True))


def test_crop_flip_against_a_loop_over_images(split):
    augment, images = CropFlip(pad=3), split.images
    draws = augment.draws(len(images), [3, 12, 12], torch.Generator().manual_seed(5))
    wanted = []
    for image, (down, right, mirrored) in zip(images.numpy(), draws.tolist(), strict=True):
        padded = np.zeros((3, 18, 18), np.uint8)
        padded[:, 3:15, 3:15] = image
        crop = padded[:, down : down + 12, right : right + 12]
        wanted.append(crop[:, :, ::-1] if mirrored else crop)
    assert np.array_equal(augment.apply(images, draws).numpy(), np.stack(wanted))
    assert set(draws[:, :2].flatten().tolist()) == set(range(7))
    assert 0.3 < draws[:, 2].float().mean() < 0.7
    assert CropFlip(3, flip=False).draws(50, [3, 12, 12], torch.Generator())[:, 2].sum() == 0


def test_crop_flip_on_images_that_are_not_square():
    images = torch.arange(2 * 1 * 4 * 7, dtype=torch.uint8).view(2, 1, 4, 7)
    out = CropFlip(pad=1).apply(images, torch.tensor([[0, 2, 0], [1, 1, 1]]))
    assert out[0, 0, 0].tolist() == [0] * 7
    assert out[0, 0, 1].tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert torch.equal(out[1], images[1].flip(2))


def test_flip_mirrors_the_drawn_images(split):
    draws = Flip().draws(150, [3, 12, 12], torch.Generator().manual_seed(0))
    out = Flip().apply(split.images, draws)
    for row, mirrored in enumerate(draws[:, 0].tolist()):
        assert torch.equal(out[row], split.images[row].flip(2) if mirrored else split.images[row])
    assert 0 < draws.sum() < 150


def test_random_erasing_fills_one_rectangle_of_the_asked_area():
    images = torch.full((400, 3, 40, 30), 7, dtype=torch.uint8)
    augment = RandomErasing(p=0.75, area=(0.1, 0.2))
    draws = augment.draws(400, [3, 40, 30], torch.Generator().manual_seed(0))
    out = augment.apply(images, draws)
    erased = 0
    for image, (top, left, bottom, right, *colour) in zip(out.numpy(), draws.tolist(), strict=True):
        wanted = np.full((3, 40, 30), 7, np.uint8)
        area = (bottom - top) * (right - left) / 1200
        erased += area > 0
        for c in range(3):
            wanted[c, int(top) : int(bottom), int(left) : int(right)] = round(colour[c] * 255)
        assert np.array_equal(image, wanted)
        assert area == 0 or 0.08 < area < 0.22
        assert 0 <= top <= bottom <= 40
        assert 0 <= left <= right <= 30
    assert 270 < erased < 330
    as_float = augment.apply(images / 255, draws)
    assert as_float.dtype == torch.float32
    assert (as_float * 255 - out).abs().max() <= 0.51


def batch_of(n: int = 6, classes: int = 4) -> dict:
    image = torch.randn(n, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    return {"image": image, "label": torch.arange(n) % classes, "index": torch.arange(n)}


def test_mixup_blends_images_and_labels_in_the_same_share():
    seen = []
    for seed in range(20):
        batch = batch_of()
        out = Mixup(alpha=1.0).mix(dict(batch), 4, torch.Generator().manual_seed(seed))
        assert torch.allclose(out["target"].sum(1), torch.ones(6))
        pairs = itertools.product(range(6), range(6))
        hits = {}
        for row, partner in pairs:
            x, y, z = batch["image"][row], batch["image"][partner], out["image"][row]
            share = float(((z - y) * (x - y)).sum() / ((x - y) ** 2).sum()) if row != partner else 1.0
            if torch.allclose(z, x * share + y * (1 - share), atol=1e-5):
                hits.setdefault(row, []).append((partner, share))
        for row in range(6):
            assert any(
                torch.allclose(
                    out["target"][row],
                    torch.eye(4)[row % 4] * share + torch.eye(4)[partner % 4] * (1 - share),
                    atol=1e-5,
                )
                for partner, share in hits[row]
            )
            seen += [share for partner, share in hits[row] if partner != row]
    assert min(seen) < 0.2
    assert max(seen) > 0.8


def test_cutmix_takes_one_rectangle_and_mixes_labels_by_its_exact_area():
    areas = set()
    for seed in range(30):
        batch = batch_of()
        out = CutMix().mix(dict(batch), 4, torch.Generator().manual_seed(seed))
        taken = out["image"] != batch["image"]
        for row in range(6):
            ys, xs = taken[row].any(0).any(1).nonzero(), taken[row].any(0).any(0).nonzero()
            if not len(ys):
                assert torch.equal(out["target"][row], torch.eye(4)[row % 4])
                continue
            box = slice(int(ys.min()), int(ys.max()) + 1), slice(int(xs.min()), int(xs.max()) + 1)
            assert bool(taken[row][:, box[0], box[1]].all())
            partners = [
                p for p in range(6) if torch.equal(out["image"][row][:, *box], batch["image"][p][:, *box]) and p != row
            ]
            share = 1 - len(ys) * len(xs) / 80
            areas.add(share)
            wanted = torch.eye(4)[row % 4] * share + torch.eye(4)[partners[0] % 4] * (1 - share)
            assert torch.allclose(out["target"][row], wanted, atol=1e-6)
    assert len(areas) > 10


def test_mixtures_leave_rows_without_a_known_label_unlabelled():
    batch = batch_of()
    batch["label"] = torch.tensor([0, -1, -1, -1, -1, -1])
    for mixture in (Mixup(1.0), CutMix()):
        out = mixture.mix(dict(batch), 4, torch.Generator().manual_seed(0))
        assert bool((out["label"][1:] == -1).all())
        assert float(out["target"][1:].abs().sum()) == 0
    alone = {k: v[:1] for k, v in batch.items()}
    assert Mixup().mix(alone, 4, torch.Generator())["target"].tolist() == [[1, 0, 0, 0]]


def test_mixtures_after_one_another_keep_probabilities(split):
    for made in epoch(split, augment=[Mixup(1.0), CutMix()], classes=10):
        assert made["target"].shape == (len(made["label"]), 10)
        assert torch.allclose(made["target"].sum(1), torch.ones(len(made["label"])), atol=1e-6)


def test_the_caller_is_told_what_does_not_fit(split):
    with pytest.raises(ValueError, match="need 3 numbers each, got 1 and 3"):
        epoch(split, mean=[0.0])
    with pytest.raises(ValueError, match="number of classes"):
        epoch(split, augment=[Mixup()])


def test_recipes_build_views_before_mixtures():
    spec = DataSpec(use="digits", augment=["mixup", {"use": "crop-flip", "pad": 2}, "cutmix", "random-erasing"])
    assert augmentations(spec) == [CropFlip(2), RandomErasing(), Mixup(), CutMix()]
    assert augmentations(DataSpec(use="digits", augment="flip")) == [Flip()]
    assert augmentations(DataSpec(use="digits", augment="none")) == []


def test_loader_speed_counts_images(split):
    speed = loader_speed(split, batch=32, mean=MEAN, std=STD, augment=[CropFlip()], seconds=0.05)
    assert speed > 1000  # a small fraction of what a busy core does
    assert loader_speed(split.take(torch.arange(0)), batch=32, mean=MEAN, std=STD) == 0
