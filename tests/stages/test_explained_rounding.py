"""Errors of weights that were rounded other than to the nearest are told against the float network's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tiny_stages import Chain

from edgekd.artifact import Artifact
from edgekd.explain.artifact import explain_artifact
from edgekd.explain.network import errors_of
from edgekd.profile import Profile
from edgekd.recipe import Component
from edgekd.stages import Quantize, Workspace
from edgekd.stages.teaching import Teaching


def test_adaptive_rounding_is_measured_against_the_weights_that_it_started_from(
    chain: Chain, workspace: Callable[..., Workspace], cpu: Profile
) -> None:
    source = chain.artifacts["distill"]

    def quantized(name: str, corrections: list[str]) -> Artifact:
        config = {"calibration": 64, "keep_float": False, "corrections": corrections, "heal": {"epochs": 0}}
        stage = Quantize.model_validate(config).resolved([cpu], Teaching(["ce"], Component(use="frozen")))
        directory: Path = source.path.parent / name
        return stage.run(workspace(stage, directory, {"source": source}))

    nearest = {e.path: e.weight_sqnr_db or 0.0 for e in errors_of(quantized("nearest", []), None)}
    rounded = quantized("rounded", ["round"])
    own = {e.path: e.weight_sqnr_db for e in errors_of(rounded, None)}
    rows = {row.path: row.weight_sqnr_db for row in explain_artifact(rounded, cpu, None).layers}
    assert rows.keys() == nearest.keys()
    for path, found in rows.items():
        assert found is not None
        assert 20 < found <= nearest[path] + 0.1  # nothing is nearer than the nearest
        flattered = own[path or ""]
        assert flattered is None or flattered > found  # on the grid already: hardly an error is left to see
    assert sum(found or 0.0 for found in rows.values()) < sum(nearest.values()) - 1
