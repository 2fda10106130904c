"""Teachers trained once for all tests of strategies, each a file of weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_strategies import MOBILE, RESNET, recipe, run, spelt_digits, tiny_digits

from edgekd.registry import register, unregister


@pytest.fixture(autouse=True, scope="session")
def _digits() -> Iterator[None]:
    register("data", "tiny-digits")(tiny_digits)
    register("data", "spelt-digits")(spelt_digits)
    yield
    unregister("data", "tiny-digits")
    unregister("data", "spelt-digits")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory, _digits: None) -> dict[str, dict[str, Any]]:
    """Tables of `[[teacher]]` with weights: `resnet` and `mobile` know all digits, `low` 0 to 5, `high` 4 to 9."""
    low, high = [str(d) for d in range(6)], [str(d) for d in range(4, 10)]
    wanted = {
        "resnet": {"model": RESNET},
        "mobile": {"model": MOBILE},
        "low": {"model": {**RESNET, "width": 8}, "classes": low},
        "high": {"model": {**RESNET, "width": 8}, "classes": high},
    }
    trained = [{**table, "epochs": 3 if "classes" in table else 5, "precision": "fp32"} for table in wanted.values()]
    made = run(recipe(trained, data={"every": 3}), tmp_path_factory.mktemp("teachers"))
    files = [artifact.file("model.safetensors") for artifact in made.artifacts.values()]
    return {name: {**table, "weights": str(file)} for (name, table), file in zip(wanted.items(), files, strict=True)}
