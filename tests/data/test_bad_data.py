"""What a user can get wrong with data: one message each, with place, expectation and hint, and exit code 2."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd.data import Source, Split, augmentations, load
from edgekd.errors import RecipeError, UsageError
from edgekd.recipe import DataSpec
from edgekd.registry import register, unregister


def fails(where: str, what: str, hint: str | None, **spec: object) -> None:
    with pytest.raises(UsageError) as caught:
        load(DataSpec(**spec), seed=0)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 2
    assert where in problem.where
    assert what in problem.what
    assert (problem.hint is None) if hint is None else (hint in (problem.hint or ""))


def test_unknown_names_and_arguments():
    fails("data", "no data called 'digit'", "did you mean 'digits'?", use="digit")
    fails("data.sise", "unknown key", "did you mean 'size'?", use="digits", sise=32)
    fails("data.size", "greater than or equal to 8, got 4", None, use="digits", size=4)
    fails("data.channels", "input should be 1 or 3, got 2", None, use="digits", channels=2)
    fails("data.root", "required", None, use="cifar10")
    fails("data.layout", "'NHWC' or 'NCHW'", None, use="npz", file="a.npz", layout="NWHC")
    fails("data.normalize.mean", "expected 3 numbers, one per channel, got 1", None, use="digits",
          normalize={"mean": [0.5], "std": [1, 1, 1]})  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        load(DataSpec(use="digits", sise=3, size="big"), seed=0)
    assert [p.where for p in caught.value.problems] == ["data.size", "data.sise"]


def test_augmentations_are_all_checked_at_once():
    augment = ["crop-flop", {"use": "crop-flip", "pad": -1}, {"use": "mixup", "alpa": 1}, "flip", "builtins:dict",
               {"use": "random-erasing", "area": [0.5, 0.1]}]  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        augmentations(DataSpec(use="digits", augment=augment))
    assert [(p.where, p.what) for p in caught.value.problems] == [
        ("data.augment[0]", "no augmentations called 'crop-flop'"),
        ("data.augment[1].pad", "input should be greater than or equal to 0, got -1"),
        ("data.augment[2].alpa", "unknown key"),
        ("data.augment[4]", "builtins:dict is no augmentation"),
        ("data.augment[5].area", "expected two shares 0 < low <= high <= 1, got [0.5, 0.1]"),
    ]
    hints = [p.hint for p in caught.value.problems]
    assert hints[0] == "did you mean 'crop-flip'?"
    assert hints[2] == "did you mean 'alpha'?"
    assert "draws() and apply(), or mix()" in hints[3]
    assert caught.value.exit_code == 2


def cifar(root: Path, **replaced: bytes | None) -> Path:
    record = np.zeros((10, 3073), np.uint8)
    record[:, 0] = np.arange(10)
    files: dict[str, bytes | None] = {f"data_batch_{k}": record.tobytes() for k in range(1, 6)}
    files |= {"test_batch": record.tobytes(), **replaced}
    for name, content in files.items():
        if content is not None:
            (root / f"{name}.bin").write_bytes(content)
    (root / "batches.meta.txt").write_text("\n".join(f"c{k}" for k in range(10)))
    return root


def test_cifar(tmp_path):
    def case(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    load(DataSpec(use="cifar10", root=str(cifar(case("sound"))), validation=0), seed=0)
    fails("nowhere", "no such directory", "cifar-10-binary.tar.gz", use="cifar10", root=str(tmp_path / "nowhere"))
    what = "no data_batch_1.bin here or in cifar-10-batches-bin"
    fails("empty", what, "data.root", use="cifar10", root=str(case("empty")))
    (case("pickled") / "cifar-10-batches-py").mkdir()
    fails("pickled", "is the pickled version", "cifar-10-binary.tar.gz", use="cifar10", root=str(tmp_path / "pickled"))
    root = cifar(case("missing"), data_batch_3=None)
    fails("data_batch_3.bin", "no such file", "unpack the archive", use="cifar10", root=str(root))
    root = cifar(case("short"), data_batch_2=b"\0" * 4000)
    fails("data_batch_2.bin", "4000 bytes are not a whole number of 3073-byte", "unpack", use="cifar10", root=str(root))
    root = cifar(case("nothing"), test_batch=b"")
    fails("test_batch.bin", "0 bytes are not", "unpack", use="cifar10", root=str(root))
    root = cifar(case("label"), data_batch_5=b"\x63" + b"\0" * 3072)
    fails("data (cifar10)", "train label 99 of image 40 is not in 0..9", "1 of 41", use="cifar10", root=str(root))
    (cifar(case("names")) / "batches.meta.txt").write_text("airplane\n")
    fails("batches.meta.txt", "expected 10 class names", None, use="cifar10", root=str(tmp_path / "names"))
    (cifar(case("directory"), data_batch_4=None) / "data_batch_4.bin").mkdir()
    fails(
        "data_batch_4.bin", "cannot be read: Is a directory", "unpack", use="cifar10", root=str(tmp_path / "directory")
    )
    file = tmp_path / "sound" / "test_batch.bin"
    fails("test_batch.bin", "is a file, expected a directory", "data.root", use="cifar10", root=str(file))


def idx_files(root: Path, **replaced: bytes | None) -> Path:
    root.mkdir()
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 20, 4, 4) + bytes(320)
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 20) + bytes(range(10)) * 2
    names = {"train_images": images, "train_labels": labels, "t10k_images": images, "t10k_labels": labels, **replaced}
    for name, content in names.items():
        if content is not None:
            prefix, kind = name.split("_")
            packed = content[:2] == b"\x1f\x8b"
            file = f"{prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte{'.gz' if packed else ''}"
            (root / file).write_bytes(content)
    return root


def test_idx(tmp_path):
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 20, 4, 4) + bytes(320)
    load(DataSpec(use="idx", root=str(idx_files(tmp_path / "sound")), validation=0), seed=0)
    cases = [
        ({"t10k_labels": None}, "", "no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz", "data.root"),
        ({"train_images": images[:-5]}, "images", "promises [20, 4, 4] = 320 bytes, the file holds 315", "damaged"),
        ({"train_images": gzip.compress(images)[:-9]}, "train-images", "cannot be unpacked", "damaged"),
        ({"train_images": b"<html>404</html>"}, "train-images", "starts with 3c68746d, expected 00000803", "damaged"),
        ({"train_images": b""}, "train-images", "starts with nothing", "damaged"),
        ({"train_labels": bytes([0, 0, 8, 1, 0, 0, 0, 3]) + bytes(3)}, "data", "20 images and 3 labels", "one"),
        ({"train_images": bytes([0, 0, 8, 3]) + struct.pack(">3I", 0, 4, 4),
          "train_labels": bytes([0, 0, 8, 1]) + struct.pack(">I", 0)}, "data (idx)", "the train split is empty", "put"),
    ]  # fmt: skip
    for number, (replaced, where, what, hint) in enumerate(cases):
        fails(where, what, hint, use="idx", root=str(idx_files(tmp_path / str(number), **replaced)))
    packed = idx_files(tmp_path / "name")
    (packed / "train-images-idx3-ubyte").write_bytes(gzip.compress(images))
    fails("train-images", "starts with 1f8b", "must end in .gz", use="idx", root=str(packed))
    for classes, what, hint in (
        (["a", "b", "c"], "train label 3 of image 3 is not in 0..2", "the 3 classes from 0; 14 of 20"),
        (["a"] * 10, "class names must be given and differ", None),
    ):
        fails("data (idx)", what, hint, use="idx", root=str(tmp_path / "sound"), classes=classes)


def picture(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (10, 20, 30)).save(file)
    return file


def folder(root: Path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            picture(root / split / name / "1.png")
    return root


def test_image_folder(tmp_path):
    def use(root: Path) -> dict[str, object]:
        return {"use": "image-folder", "root": str(root), "size": 8, "validation": 0}

    load(DataSpec(**use(folder(tmp_path / "sound"))), seed=0)
    fails("nowhere", "no such directory", "ROOT/train/CLASS/*.png", **use(tmp_path / "nowhere"))
    (tmp_path / "no-test" / "train" / "cat").mkdir(parents=True)
    fails("test", "no such directory", "ROOT/test/CLASS/*.png", **use(tmp_path / "no-test"))
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "test").mkdir()
    fails("train", "has no class folders", "ROOT/train/CLASS/*.png", **use(tmp_path / "flat"))
    (folder(tmp_path / "empty") / "train" / "dog" / "1.png").unlink()
    fails("train/dog", "has no pictures", "endings read: .bmp", **use(tmp_path / "empty"))
    picture(folder(tmp_path / "unseen") / "test" / "emu" / "1.png")
    fails("test/emu", "the class 'emu' is in test, but training never saw it", "cat, dog", **use(tmp_path / "unseen"))
    damaged = folder(tmp_path / "damaged") / "train" / "cat" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    fails("train/cat/1.png", "cannot be read as a picture", "mend or delete", **use(tmp_path / "damaged"))
    (folder(tmp_path / "text") / "test" / "cat" / "2.jpg").write_text("hello")
    fails("test/cat/2.jpg", "not a picture Pillow knows", "mend or delete", **use(tmp_path / "text"))
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder(tmp_path / "deep") / "train" / "cat" / "2.png")
    fails("train/cat/2.png", "more than 8 bits per channel (mode I;16)", "8 bits", **use(tmp_path / "deep"))
    for name in ("val", "validation"):
        picture(folder(tmp_path / "twice") / name / "cat" / "1.png")
    fails("twice", "has both val and validation", "keep one", **use(tmp_path / "twice"))
    single = use(tmp_path / "sound") | {"validation": 0.1}
    fails("data (image-folder)", "every class has one", "data.validation = 0", **single)


def arrays(**replaced: np.ndarray | None) -> dict[str, np.ndarray]:
    sound = {"x_train": np.zeros((6, 4, 4, 3), np.uint8), "y_train": np.arange(6) % 3,
             "x_test": np.zeros((3, 4, 4, 3), np.uint8), "y_test": np.arange(3)}  # fmt: skip
    return {k: v for k, v in (sound | replaced).items() if v is not None}


def test_npz(tmp_path):
    file = tmp_path / "d.npz"
    floats = np.full((6, 4, 4, 3), 0.5)
    holed, large = floats.copy(), floats.copy()
    holed[4, 1, 2, 0] = np.nan
    large[2] = 3.0
    cases = [
        ({"y_test": None}, "d.npz", "has no array y_test", "it has: x_train, y_train, x_test"),
        ({"x_val": floats}, "d.npz", "has no array y_val", "it has: "),
        ({"x_train": holed}, "x_train", "image 4 has NaN or infinite values, expected [0, 1] (1 such", "mend or drop"),
        ({"x_train": large}, "x_train", "image 2 has values up to 3, expected [0, 1]", "divide by 255"),
        ({"x_train": floats - 1}, "x_train", "image 0 has values down to -0.5", "data.normalize"),
        ({"x_train": floats.astype(np.int32)}, "x_train", "must be uint8 or floating point, got int32", "astype"),
        ({"x_train": np.zeros((6, 48), np.uint8)}, "x_train", "must be NHWC or [N, H, W], got shape [6, 48]", None),
        ({"x_train": np.zeros((6, 3, 4, 8), np.uint8)}, "x_train", "read as NHWC has 8 channels", "looks like NCHW"),
        ({"y_train": np.eye(6)}, "y_train", "labels must be integers [N], got float64 [6, 6]", "use argmax"),
        ({"y_train": np.arange(5)}, "data (npz)", "train has 6 images and 5 labels", "one label per image"),
        ({"y_test": np.array([0, 1, 7])}, "data (npz)", "test split has the class '7', which training never", "add tr"),
        ({"y_test": np.array([3, 9, 7])}, "data (npz)", "has 3 classes ('3', '7', '9'), which training", "add tr"),
        ({"y_test": np.array([0, -1, 1])}, "data (npz)", "test label -1 of image 1 is not in 0..2", "1 of 3"),
        ({"y_train": np.full(6, -1)}, "data (npz)", "no training image has a label", "unlabelled rows (-1)"),
        ({"x_test": np.zeros((0, 4, 4, 3), np.uint8), "y_test": np.arange(0)}, "data", "test split is empty", "put"),
        ({"x_test": np.zeros((3, 5, 4, 3), np.uint8)}, "data (npz)", "test images are torch.uint8 [3, 5, 4]", "same"),
        ({"x_test": np.zeros((3, 4, 4, 3))}, "data (npz)", "test images are torch.float32 [3, 4, 4]", "same size"),
        ({"x_train": np.array([{}, 1], dtype=object)}, "d.npz", "Python objects, which need pickle", "convert"),
    ]  # fmt: skip
    for replaced, where, what, hint in cases:
        np.savez(file, **arrays(**replaced))
        fails(where, what, hint, use="npz", file=str(file), validation=0)
    np.savez(file, **arrays())
    sound = file.read_bytes()
    fails("none.npz", "no such file", "data.file", use="npz", file=str(tmp_path / "none.npz"))
    for name, content in (("cut", sound[:-100]), ("text", b"hello"), ("nothing", b"")):
        (tmp_path / f"{name}.npz").write_bytes(content)
        fails(f"{name}.npz", "is damaged, or no .npz file", "np.savez", use="npz", file=str(tmp_path / f"{name}.npz"))
    np.save(tmp_path / "one.npy", np.zeros(3))
    fails("one.npy", "holds one array", "np.savez", use="npz", file=str(tmp_path / "one.npy"))
    fails(str(tmp_path), "cannot be read: Is a directory", "np.savez", use="npz", file=str(tmp_path))


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5], None), ([0.5, 0.5], [1.0]), ([0.5], [0.0])]
)  # fmt: skip
def test_a_source_whose_normalisation_does_not_fit(mean, std):
    split = Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4) % 2)

    @register("data", "test-unfit")
    def source() -> Source:
        return Source(split, split, ["a", "b"], mean=mean, std=std)

    try:
        fails("data (test-unfit)", "do not fit 1 channels", "one number per channel", use="test-unfit", validation=0)
    finally:
        unregister("data", "test-unfit")


TARGETS = [
    ({"parity": torch.zeros(5, dtype=torch.int64)}, "train.targets['parity'] must be int64 [8], got torch.int64 [5]"),
    ({"parity": torch.zeros(8)}, "train.targets['parity'] must be int64 [8], got torch.float32 [8]"),
    ({"parity": [0] * 8}, "train.targets['parity'] must be int64 [8], got list []"),
    (None, "train.targets must be a dict from heads to labels, got NoneType"),
]


@pytest.mark.parametrize(("targets", "what"), TARGETS)
def test_labels_of_further_heads(targets, what):
    def told():
        images, labels = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % 2
        return Source(Split(images, labels, targets), Split(images, labels), ["a", "b"])

    register("data", "told")(told)
    try:
        fails("data (told)", what, "leave them out" if targets is None else "one label per image", use="told")
    finally:
        unregister("data", "told")


def test_the_fingerprint_knows_the_names_of_heads_and_their_labels():
    images, labels = torch.arange(512, dtype=torch.uint8).view(8, 1, 8, 8), torch.arange(8) % 2

    def fingerprint(**targets):
        register("data", "told")(lambda: Source(Split(images, labels, targets), Split(images, labels), ["a", "b"]))
        try:
            return load(DataSpec(use="told", validation=0), seed=0).fingerprint
        finally:
            unregister("data", "told")

    found = [fingerprint(), fingerprint(a=labels), fingerprint(b=labels), fingerprint(a=1 - labels)]
    assert len(set(found)) == 4
    # Without further heads it is what it was before there were any.
    old = hashlib.sha256(json.dumps(["a", "b"]).encode())
    for name, count in (("train", 8), ("validation", 0), ("test", 8)):
        old.update(f"{name} torch.uint8 [{count}, 1, 8, 8]".encode())
        old.update(images[:count].numpy().data)
        old.update(labels[:count].numpy().data)
    assert found[0] == old.hexdigest()
