"""Every built-in source read from files of its own format, and `load` on top of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from edgekd.data import Dataset, Source, Split, load
from edgekd.data.source import stratified
from edgekd.recipe import DataSpec
from edgekd.registry import names, register, unregister

DATA = Path(os.environ.get("EDGEKD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pictures(count: int, seed: int = 0, size: int = 32, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Real digits as uint8 [count, channels, size, size], each class equally often, and their labels."""
    digits = load_digits()
    rows = np.concatenate([np.flatnonzero(digits.target == c)[seed * 20 : seed * 20 + count // 10] for c in range(10)])
    grey = np.repeat(np.repeat(digits.images[rows] * 255 / 16, size // 8, 1), size // 8, 2).astype(np.uint8)
    return np.repeat(grey[:, None], channels, 1), digits.target[rows].astype(np.uint8)


def write_cifar10(folder: Path, per_file: int = 20) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    kept = []
    for number, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        images, labels = pictures(per_file, seed=number)
        images[:, 1] //= 2  # channels must not be mixed up
        (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], images.reshape(-1, 3072)], 1).tobytes())
        kept.append((images, labels))
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10) + "\n\n")
    return np.concatenate([x for x, _ in kept[:5]]), np.concatenate([y for _, y in kept[:5]])


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def rows_of(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


def test_the_shipped_sources_are_known():
    assert {"cifar10", "cifar100", "digits", "idx", "image-folder", "npz"} <= set(names("data"))
    assert {"crop-flip", "cutmix", "flip", "mixup", "random-erasing"} <= set(names("augmentations"))


def test_digits_are_the_real_ones_in_disjoint_stratified_splits():
    data = load(DataSpec(use="digits", size=8, channels=1), seed=0)
    bunch = load_digits()
    original = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    found = rows_of(data.train) + rows_of(data.validation) + rows_of(data.test)
    assert sorted(found) == sorted(image.tobytes() for image in original)
    assert [len(data.train), len(data.validation), len(data.test)] == [1294, 144, 359]
    for split, share in ((data.test, 359 / 1797), (data.validation, 144 / 1797)):
        counts = torch.bincount(split.labels, minlength=10).numpy()
        assert np.abs(counts - share * np.bincount(bunch.target)).max() <= 1
    assert data.size == [1, 8, 8]
    assert data.classes == [str(k) for k in range(10)]
    by_bytes = {image.tobytes(): label for image, label in zip(original, bunch.target, strict=True)}
    assert [by_bytes[b] for b in rows_of(data.test)] == data.test.labels.tolist()


def test_digits_are_enlarged_bilinearly_and_repeated():
    data = load(DataSpec(use="digits"), seed=0)
    assert data.size == [3, 32, 32]
    assert torch.equal(data.test.images[:, 0], data.test.images[:, 2])
    small = load(DataSpec(use="digits", size=8), seed=0).test.images[0, 0].double()
    wanted = np.zeros((32, 32))
    for y in range(32):
        for x in range(32):
            v, h = (np.clip((k + 0.5) / 4 - 0.5, 0, 7) for k in (y, x))
            y0, x0 = int(v), int(h)
            y1, x1 = min(y0 + 1, 7), min(x0 + 1, 7)
            top = small[y0, x0] * (1 - h + x0) + small[y0, x1] * (h - x0)
            bottom = small[y1, x0] * (1 - h + x0) + small[y1, x1] * (h - x0)
            wanted[y, x] = top * (1 - v + y0) + bottom * (v - y0)
    assert np.abs(data.test.images[0, 0].numpy() - wanted).max() <= 1.01  # both sides were rounded to whole numbers


def test_the_test_split_is_fixed_and_the_seed_moves_validation_only():
    first, again, other = (load(DataSpec(use="digits", size=8), seed=s) for s in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.test.images, other.test.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    assert sorted(rows_of(first.train) + rows_of(first.validation)) == sorted(
        rows_of(other.train) + rows_of(other.validation)
    )


def test_fingerprint_is_the_sha256_of_images_labels_splits_and_classes():
    data = load(DataSpec(use="digits", size=8, validation=0), seed=0)
    assert len(data.validation) == 0
    wanted = hashlib.sha256(json.dumps(data.classes).encode())
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        wanted.update(f"{name} torch.uint8 {[len(split), 3, 8, 8]}".encode())
        wanted.update(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
    assert data.fingerprint == wanted.hexdigest()


def test_normalisation_is_computed_given_or_the_sources_own(tmp_path):
    computed = load(DataSpec(use="digits", size=16), seed=0)
    pixels = computed.train.images.numpy().astype(np.float64) / 255
    assert np.allclose(computed.mean, pixels.mean((0, 2, 3)), atol=1e-12)
    assert np.allclose(computed.std, pixels.std((0, 2, 3)), atol=1e-12)
    given = load(DataSpec(use="digits", normalize={"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}), seed=0)
    assert (given.mean, given.std) == ([0.1, 0.2, 0.3], [1, 2, 3])
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    assert load(DataSpec(use="cifar10", root=str(tmp_path)), seed=0).mean == [0.4914, 0.4822, 0.4465]


def test_a_constant_channel_is_left_alone(tmp_path):
    np.savez(tmp_path / "flat.npz", **{f"x_{s}": np.full((4, 2, 2, 3), 51, np.uint8) for s in ("train", "test")},
             y_train=np.arange(4) % 2, y_test=np.arange(4) % 2)  # fmt: skip
    data = load(DataSpec(use="npz", file=str(tmp_path / "flat.npz"), validation=0), seed=0)
    assert data.mean == pytest.approx([0.2] * 3)
    assert data.std == [1.0] * 3


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="EDGEKD_DATA names no directory with cifar10/")
def test_cifar10_binary_with_its_real_images(tmp_path):
    mosaics = [np.asarray(Image.open(file).convert("RGB")) for file in sorted((DATA / "cifar10").glob("test-*.webp"))]
    tiles = [m.reshape(50, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(2500, 3072) for m in mosaics]
    mixed = np.arange(0, 10_000, 20).reshape(10, 50).T.ravel()  # they lie sorted by class
    images, labels = np.concatenate(tiles)[mixed], np.load(DATA / "cifar10" / "test-labels.npy")[mixed].astype(np.uint8)
    records = np.concatenate([labels[:, None], images], 1)
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for name, part in zip(names, np.array_split(records, 6), strict=True):
        (tmp_path / f"{name}.bin").write_bytes(part.tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join(CIFAR10))
    data = load(DataSpec(use="cifar10", root=str(tmp_path), validation=0), seed=0)
    both = torch.cat([data.train.images, data.test.images])
    assert np.array_equal(both.numpy().reshape(-1, 3072), images)
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == labels.tolist()
    pixels = both.double() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(data.mean).double(), atol=0.03)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(data.std).double(), atol=0.03)


@pytest.mark.parametrize("below", [True, False])
def test_cifar10_binary(tmp_path, below):
    folder = tmp_path / "cifar-10-batches-bin"
    images, labels = write_cifar10(folder)
    data = load(DataSpec(use="cifar10", root=str(tmp_path if below else folder), validation=0), seed=0)
    assert np.array_equal(data.train.images.numpy(), images)
    assert data.train.labels.tolist() == labels.tolist()
    assert np.array_equal(data.test.images.numpy()[:, 1], pictures(20, seed=5)[0][:, 1] // 2)
    assert data.classes == CIFAR10


def test_cifar100_binary_takes_the_fine_label(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    fine = np.arange(200, dtype=np.uint8) % 100
    images = np.random.default_rng(0).integers(0, 256, (200, 3072), np.uint8)
    for name in ("train", "test"):
        (folder / f"{name}.bin").write_bytes(np.concatenate([fine[:, None] // 5, fine[:, None], images], 1).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"class {k}" for k in range(100)))
    data = load(DataSpec(use="cifar100", root=str(tmp_path), validation=0), seed=0)
    assert data.train.labels.tolist() == fine.tolist()
    assert np.array_equal(data.train.images.numpy(), images.reshape(-1, 3, 32, 32))
    assert data.classes[99] == "class 99"
    held = load(DataSpec(use="cifar100", root=str(tmp_path), validation=0.1), seed=0).validation
    assert len(held) == 20
    assert len(held.labels.unique()) == 20  # 0.2 of an image each: twenty classes give one


@pytest.mark.parametrize("packed", [True, False])
def test_idx(tmp_path, packed):
    for prefix, seed in (("train", 0), ("t10k", 1)):
        images, labels = pictures(100, seed=seed, size=24, channels=1)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images[:, 0]), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = idx_bytes(array)
            (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    data = load(DataSpec(use="idx", root=str(tmp_path), validation=0), seed=0)
    assert np.array_equal(data.train.images.numpy(), pictures(100, 0, 24, 1)[0])
    assert data.test.labels.tolist() == pictures(100, 1)[1].tolist()
    assert data.classes == [str(k) for k in range(10)]
    named = DataSpec(use="idx", root=str(tmp_path), classes=[f"shirt {k}" for k in range(10)])
    assert load(named, seed=0).classes[3] == "shirt 3"


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "test")) -> None:
    for number, split in enumerate(splits):
        images, labels = pictures(40, seed=number, size=16)
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split / f"digit {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{row:03}.png")


def test_image_folder(tmp_path):
    write_folder(tmp_path, ("train", "test", "val"))
    (tmp_path / "train" / "digit 0" / "notes.txt").write_text("not a picture")
    (tmp_path / "train" / ".cache").mkdir()
    data = load(DataSpec(use="image-folder", root=str(tmp_path), size=16), seed=0)
    assert np.array_equal(data.train.images.numpy(), pictures(40, size=16)[0])  # same size: not one pixel changes
    assert data.train.labels.tolist() == pictures(40)[1].tolist()
    assert np.array_equal(data.validation.images.numpy(), pictures(40, 2, 16)[0])
    assert data.classes == [f"digit {k}" for k in range(10)]


def test_image_folder_resizes_the_shorter_side_and_cuts_the_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = [200, 100, 50]
    for split in ("train", "test"):
        for name, picture in (("wide", wide), ("tall", wide.transpose(1, 0, 2)), ("grey", wide[:, :, 0])):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.ascontiguousarray(picture)).save(folder / "1.webp", lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    (tmp_path / "train" / "wide" / "1.webp").unlink()
    Image.fromarray(np.ascontiguousarray(wide.transpose(1, 0, 2)[:40])).save(
        tmp_path / "train" / "wide" / "1.png", exif=turned
    )
    data = load(DataSpec(use="image-folder", root=str(tmp_path), size=10, validation=0), seed=0)
    by_class = {data.classes[k]: image for k, image in zip(data.test.labels.tolist(), data.test.images, strict=True)}
    for name in ("wide", "tall"):
        assert torch.equal(by_class[name][:, 1:-1, 1:-1], torch.tensor([200, 100, 50]).view(3, 1, 1).expand(3, 8, 8))
    assert int(by_class["grey"][2, 5, 5]) == 200
    upright = data.train.images[data.classes.index("wide")]  # 40 wide after turning: half of it is the bright square
    assert upright[0, 5].tolist().count(200) in range(4, 7)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", ["uint8", "float64"])
def test_npz(tmp_path, layout, kind):
    arrays = {}
    for seed, split in enumerate(("train", "test", "val")):
        images, labels = pictures(50, seed, 16)
        images = images if kind == "uint8" else images / 255
        arrays[f"x_{split}"] = images if layout == "NCHW" else images.transpose(0, 2, 3, 1)
        arrays[f"y_{split}"] = labels[:, None] if seed else labels
    np.savez_compressed(tmp_path / "d.npz", **arrays)
    data = load(DataSpec(use="npz", file=str(tmp_path / "d.npz"), layout=layout), seed=0)
    for seed, split in enumerate((data.train, data.test, data.validation)):
        images, labels = pictures(50, seed, 16)
        wanted = images if kind == "uint8" else (images / 255).astype(np.float32)
        assert split.images.numpy().dtype == wanted.dtype
        assert np.array_equal(split.images.numpy(), wanted)
        assert split.labels.tolist() == labels.tolist()
    assert isinstance(data, Dataset)


def test_npz_of_grey_images_without_a_channel_axis(tmp_path):
    images, labels = pictures(50, size=16, channels=1)
    np.savez(tmp_path / "g.npz", x_train=images[:, 0], y_train=labels, x_test=images[:, 0], y_test=labels)
    data = load(DataSpec(use="npz", file=str(tmp_path / "g.npz"), classes=list("abcdefghij")), seed=0)
    assert data.size == [1, 16, 16]
    assert data.classes == list("abcdefghij")


def test_stratified_holds_out_in_proportion_and_never_a_whole_class():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3] + [-1] * 20)
    kept, held = stratified(labels, 0.25, torch.Generator().manual_seed(0))
    assert sorted(kept.tolist() + held.tolist()) == list(range(120))
    assert torch.bincount(labels[held], minlength=4).tolist() == [15, 8, 2, 0]
    assert int((labels[kept] == -1).sum()) == 20
    assert len(stratified(torch.tensor([0, 0, 1, 1]), 0.01, torch.Generator())[1]) == 1
    assert len(stratified(torch.tensor([0, 1]), 0.5, torch.Generator())[1]) == 0


def test_unlabelled_training_images_stay_in_training():
    images, labels = (torch.from_numpy(a) for a in pictures(100, size=8))
    unlabelled = labels.long().clone()
    unlabelled[::2] = -1

    @register("data", "test-unlabelled")
    def source() -> Source:
        return Source(Split(images, unlabelled), Split(images, labels.long()), [str(k) for k in range(10)])

    try:
        data = load(DataSpec(use="test-unlabelled", validation=0.2), seed=0)
    finally:
        unregister("data", "test-unlabelled")
    assert int((data.train.labels == -1).sum()) == 50
    assert int(data.validation.labels.min()) >= 0
    assert len(data.validation) == 10
