"""Data sets that come from the user's own function."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from edgekd.data import Source, Split, load
from edgekd.errors import RecipeError, UsageError
from edgekd.recipe import DataSpec

DIGITS = load_digits()
PIXELS = np.rint(DIGITS.images * 255 / 16).astype(np.uint8)


class Digits(Dataset):
    """What a user has: a map-style data set of (image, label)."""

    def __init__(self, rows: range, form: str = "array", classes: list[str] | None = None) -> None:
        self.rows, self.form = rows, form
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[object, object]:
        image, label = PIXELS[self.rows[item]], DIGITS.target[self.rows[item]]
        forms = {
            "array": (image, label),
            "hwc": (np.stack([image] * 3, 2), int(label)),
            "tensor": (torch.from_numpy(image)[None].float() / 255, torch.tensor(label)),
            "half": (torch.from_numpy(image)[None].to(torch.bfloat16) / 255, int(label)),
            "pil": (Image.fromarray(image), int(label)),
            "palette": (Image.fromarray(image).convert("P"), int(label)),
        }
        return forms[self.form]


class Stream(IterableDataset):
    def __init__(self, rows: range) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return ((PIXELS[r], int(DIGITS.target[r])) for r in self.rows)


TRAIN, TEST = range(100), range(100, 160)


@pytest.fixture
def own(monkeypatch):
    """Make `module:make` return (or be) what a test gives, and load it."""

    def use(result: object, validation: float = 0.0, **args: object):
        module = ModuleType("own_data_of_a_test")
        module.make = result if callable(result) else lambda: result
        module.make.__module__ = module.__name__
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return load(DataSpec(use=f"{module.__name__}:make", validation=validation, **args), seed=0)

    return use


@pytest.mark.parametrize("form", ["array", "hwc", "tensor", "half", "pil", "palette"])
def test_torch_data_sets_of_every_kind_of_image(own, form):
    data = own({"train": Digits(TRAIN, form), "test": Digits(TEST, form)})
    channels = 3 if form in ("hwc", "palette") else 1
    assert data.size == [channels, 8, 8]
    assert data.train.labels.tolist() == DIGITS.target[:100].tolist()
    found = data.test.images.numpy()[:, 0]
    if form in ("tensor", "half"):
        assert data.test.images.dtype == torch.float32
        assert np.abs(found * 255 - PIXELS[100:160]).max() < (1 if form == "half" else 1e-4)
    else:
        assert np.array_equal(found, PIXELS[100:160])
    assert data.classes == [str(k) for k in range(10)]


def test_a_tuple_a_stream_a_list_subsets_and_arrays(own):
    wanted = DIGITS.target[100:160].tolist()
    streams = own((Stream(TRAIN), Stream(TEST)))
    assert streams.test.labels.tolist() == wanted
    items = own((Digits(TRAIN), [(PIXELS[r], DIGITS.target[r]) for r in TEST], list("abcdefghij")))
    assert items.test.labels.tolist() == wanted
    assert items.classes == list("abcdefghij")
    whole = Digits(range(200), classes=[f"digit {k}" for k in range(10)])
    subsets = own({"train": Subset(whole, TRAIN), "test": Subset(whole, TEST), "validation": Subset(whole, [170, 171])})
    assert subsets.validation.labels.tolist() == DIGITS.target[170:172].tolist()
    assert subsets.classes[4] == "digit 4"
    pairs = own({"train": (PIXELS[:100], DIGITS.target[:100]), "test": (PIXELS[100:160], DIGITS.target[100:160])})
    assert torch.equal(pairs.test.images, items.test.images)
    tensors = torch.from_numpy(PIXELS)[:, None], torch.from_numpy(DIGITS.target)
    nchw = own({"train": [t[:100] for t in tensors], "test": TensorDataset(*(t[100:160] for t in tensors))})
    assert torch.equal(nchw.test.images, items.test.images)
    assert nchw.train.labels.tolist() == DIGITS.target[:100].tolist()


def test_a_source_passes_with_its_own_normalisation_and_arguments_are_checked(own):
    images, labels = torch.from_numpy(PIXELS)[:, None], torch.from_numpy(DIGITS.target).long()

    def make(count: int, share: float = 0.5) -> Source:
        train, test = Split(images[:count], labels[:count]), Split(images[count:], labels[count:])
        return Source(train, test, [str(k) for k in range(10)], mean=[share], std=[2 * share])

    data = own(make, count=500, share=0.25)
    assert (len(data.train), data.mean, data.std) == (500, [0.25], [0.5])
    with pytest.raises(RecipeError) as caught:
        own(make, cuont=500, share="much")
    places = {p.where: p for p in caught.value.problems}
    assert set(places) == {"data.count", "data.cuont", "data.share"}
    assert places["data.cuont"].hint == "did you mean 'count'?"
    assert caught.value.exit_code == 2


def broken(change: dict[int, object]) -> list[object]:
    items: list[object] = [(PIXELS[r], int(DIGITS.target[r])) for r in TRAIN]
    for row, item in change.items():
        items[row] = item
    return items


class Raises(Digits):
    def __getitem__(self, item: int) -> tuple[object, object]:
        if item == 5:
            raise OSError("disk on fire")
        return super().__getitem__(item)


SOUND = Digits(TEST)
WHOLE = Digits(range(200))
NORMALISED = (torch.from_numpy(PIXELS[0])[None] / 255 - 0.5) / 0.5
HINTS = {
    "returned": 'return {"train"',
    "item": "reading this item by itself",
}


@pytest.mark.parametrize(
    ("result", "where", "what", "hint"),
    [
        (7, "make", "returned int", HINTS["returned"]),
        ((PIXELS, DIGITS.target), "make", "returned tuple of 2", HINTS["returned"]),
        ({"train": SOUND}, "make", "returned no 'test' split", HINTS["returned"]),
        ({"trian": SOUND, "test": SOUND}, "make", "unknown key 'trian'", "did you mean 'train'?"),
        ({"train": WHOLE, "test": SOUND, "classes": "ab"}, "make", "must be a list of names, got str", "return"),
        ((WHOLE, SOUND, WHOLE), "make", "classes must be a list of names, got Digits", "return"),
        ({"train": WHOLE, "test": WHOLE}, "make", "train and test share images", "seen in training"),
        ({"train": Subset(WHOLE, range(50)), "test": Subset(WHOLE, range(49, 60))}, "make", "share images", "training"),
        (
            {"train": Subset(Subset(WHOLE, range(50, 80)), [3]), "test": Subset(WHOLE, [53])},
            "make",
            "train and test share images",
            "seen in training",
        ),
        (
            {"train": (PIXELS[:60], DIGITS.target[:60]), "test": (PIXELS[59:], DIGITS.target[59:])},
            "make",
            "train and test share images",
            "seen in training",
        ),
        ({"train": "folder", "test": SOUND}, "make, train", "is str", HINTS["returned"]),
        ({"train": PIXELS, "test": SOUND}, "make, train", "is ndarray [1797, 8, 8]", HINTS["returned"]),
        ({"train": [], "test": SOUND}, "make, train", "is empty", "no items"),
        ({"train": Raises(TRAIN), "test": SOUND}, "make, train[5]", "OSError: disk on fire", HINTS["item"]),
        ({"train": broken({3: PIXELS[3]}), "test": SOUND}, "make, train[3]", "is ndarray [8, 8], expected (im", None),
        ({"train": broken({3: ("a.png", 1)}), "test": SOUND}, "make, train[3]", "the image is str", "a PIL image"),
        (
            {"train": broken({3: (PIXELS[3, :4], 1)}), "test": SOUND},
            "make, train[3]",
            "the image is torch.uint8 [1, 4, 8], the first one torch.uint8 [1, 8, 8]",
            "resize or crop all images",
        ),
        (
            {"train": broken({3: (PIXELS[None, :3, None], 1)}), "test": SOUND},
            "make, train[3]",
            "the image has shape [1, 3, 1, 8, 8], expected [H, W, C] or [H, W]",
            "one image per item",
        ),
        ({"train": broken({3: (PIXELS[3], 1.5)}), "test": SOUND}, "make, train[3]", "the label is float", None),
        ({"train": broken({3: (PIXELS[3], "cat")}), "test": SOUND}, "make, train[3]", "the label is str", None),
        (
            {"train": broken({3: (PIXELS[3].astype(int), 1)}), "test": SOUND},
            "make, train[3]",
            "must be uint8 or floating point, got int64",
            "astype('uint8')",
        ),
        (
            {"train": broken({3: (torch.rand(8, 8, 3), 1)}), "test": SOUND},
            "make, train[3]",
            "shape [1, 8, 8, 3] read as NCHW has 8 channels",
            "looks like NHWC",
        ),
        (
            {"train": broken({0: (NORMALISED, 1)}), "test": SOUND},
            "make, train[0]",
            "values down to -1",
            "leave normalisation to edgekd",
        ),
        (
            {"train": broken({2: (PIXELS[2].astype(float), 1)}), "test": SOUND},
            "make, train[2]",
            "values up to 255",
            "divide by 255",
        ),
        (
            {"train": (PIXELS[:9], DIGITS.target[:9] + 0.5), "test": SOUND},
            "make, train labels",
            "labels must be integers [N], got float64 [9]",
            "number the classes from 0",
        ),
        (Source(WHOLE, SOUND, ["a"]), "data (", "train must be a Split of images uint8 or float32", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_split_and_the_item(own, result, where, what, hint):
    with pytest.raises(UsageError) as caught:
        own(lambda: result)
    problem = caught.value.problem
    assert caught.value.exit_code == 2
    assert where in problem.where
    assert what in problem.what
    assert (problem.hint is None) if hint is None else (hint in (problem.hint or ""))


def test_an_exception_of_the_function_is_a_message(own):
    def make() -> None:
        raise KeyError("frames")

    with pytest.raises(UsageError, match=r"own_data_of_a_test:make failed: KeyError: 'frames'") as caught:
        own(make)
    assert caught.value.exit_code == 2
    assert "by itself" in (caught.value.problem.hint or "")
