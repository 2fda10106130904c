from __future__ import annotations

import numpy as np
import pytest
import tiny_onnx

from edgekd.bench import evaluate
from edgekd.errors import StageError, UsageError
from edgekd.runtimes import open_session

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 1, 4, 4), dtype=np.uint8)


def scaled(images):
    return (images / np.float32(255) - 0.5) / 0.25


@pytest.mark.parametrize("batch", [5, 23, 250])
@pytest.mark.parametrize("axis", ["batch", 4, 1])
def test_logits_equal_numpy_for_every_image(tmp_path, batch, axis):
    """With a static axis the last batch is filled up, and only the images' own rows come back."""
    file, weights = tiny_onnx.linear_classifier(tmp_path / "m.onnx", batch=axis)
    logits = evaluate(open_session(file), IMAGES, scaled, batch)
    np.testing.assert_allclose(logits, scaled(IMAGES).reshape(23, -1) @ weights, rtol=1e-4, atol=1e-4)


def test_a_uint8_network_gets_raw_images(tmp_path):
    file, weights = tiny_onnx.linear_classifier(tmp_path / "m.onnx", dtype="uint8")
    logits = evaluate(open_session(file), IMAGES, lambda _: pytest.fail("preprocessed"))
    np.testing.assert_allclose(logits, IMAGES.reshape(23, -1).astype(np.float32) @ weights, rtol=1e-4, atol=1e-2)
    with pytest.raises(UsageError, match="takes raw uint8 images, the data are float32"):
        evaluate(open_session(file), IMAGES.astype(np.float32), scaled)


def test_preprocessing_in_double_precision_is_taken(tmp_path):
    file, weights = tiny_onnx.linear_classifier(tmp_path / "m.onnx")
    logits = evaluate(open_session(file), IMAGES, lambda x: x.astype(np.float64))
    np.testing.assert_allclose(logits, IMAGES.reshape(23, -1) @ weights.astype(float), rtol=1e-4, atol=1e-2)


def test_nan_and_infinity_name_the_image(tmp_path):
    session = open_session(tiny_onnx.logarithm(tmp_path / "log.onnx"))
    images = np.ones((9, 1, 1, 2), np.float32)
    assert (evaluate(session, images, lambda x: x, batch=4) == 0).all()
    for bad in (-1.0, np.inf):
        images[6] = bad
        with pytest.raises(StageError, match="1 of 4 images, first for test image 6"):
            evaluate(session, images, lambda x: x, batch=4)


def test_what_cannot_be_evaluated(tmp_path):
    file, _ = tiny_onnx.linear_classifier(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="test set is empty"):
        evaluate(open_session(file), IMAGES[:0], scaled)
    with pytest.raises(UsageError, match=r"got shape \[23, 1, 4, 2\]"):
        evaluate(open_session(file), IMAGES[..., :2], scaled)
    with pytest.raises(UsageError, match="has inputs a, b, expected one"):
        evaluate(open_session(tiny_onnx.two_inputs(tmp_path / "two.onnx")), IMAGES, scaled)
