"""What a search leaves: the best recipe, a record of all trials, and a page that shows them."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..artifact import write_atomically
from ..recipe import to_toml
from ..report.trials import trials_html
from .space import Space, recipe_with
from .study import alone, values_of

__all__ = ["ended", "write"]

#: Fewer finished trials say nothing about which field matters.
MIN_TRIALS = 6


def write(space: Space, study: optuna.Study) -> dict[str, Any]:
    """Write `trials.json`, `search.html` and, where a trial came to its end, `best.toml`; the record."""
    with alone(space.directory):
        document = _document(space, study)
        best = document["best"]
        if best is not None:
            write_atomically(space.directory / "best.toml", to_toml(recipe_with(space.recipe, best["values"])))
        write_atomically(space.directory / "trials.json", json.dumps({"version": 1, **document}, indent=1) + "\n")
        write_atomically(space.directory / "search.html", trials_html(document))
    return document


def ended(document: dict[str, Any], number: int) -> dict[str, Any]:
    """How a trial ended, and what the best is by now: for whoever watches."""
    trial = next(t for t in document["trials"] if t["number"] == number)
    keys = ("number", "state", "value", "epochs", "error")
    return {**{k: trial[k] for k in keys}, "metric": document["metric"], "best": document["best"]}


def _document(space: Space, study: optuna.Study) -> dict[str, Any]:
    trials = [_trial(space, t) for t in study.get_trials(deepcopy=False)]
    ended = [t for t in trials if t["state"] == "complete"]
    sign = 1 if space.direction == "max" else -1
    best = max(ended, key=lambda t: (sign * t["value"], -t["number"]), default=None)
    return {
        "name": space.recipe.name,
        "study": study.study_name,
        "directory": str(space.directory),
        "stage": space.stage,
        "metric": space.metric,
        "direction": space.direction,
        "fields": {p: a.model_dump(mode="json", exclude_none=True) for p, a in space.search.fields.items()},
        "best": None if best is None else {k: best[k] for k in ("number", "value", "values", "directory")},
        "importance": _importance(study, len(ended)),
        "trials": trials,
    }


def _trial(space: Space, t: FrozenTrial) -> dict[str, Any]:
    error = t.user_attrs.get("error")
    failed = t.state == TrialState.PRUNED and error is not None
    state = "failed" if failed else "lost" if t.state == TrialState.FAIL else t.state.name.lower()
    whole = set(t.params) == set(space.search.fields)
    curve = sorted(t.intermediate_values.items())
    return {
        "number": t.number,
        "state": state,
        "value": t.value if t.state == TrialState.COMPLETE else None,
        "values": values_of(space, t.params) if whole else {},
        "epochs": len(curve),
        "seconds": t.user_attrs.get("seconds", 0.0),
        "seed": space.recipe.seed,
        "directory": str(space.trials / f"{t.number:04d}"),
        "error": error,
        "curve": [[epoch + 1, value] for epoch, value in curve],
    }


def _importance(study: optuna.Study, ended: int) -> dict[str, float]:
    """The share of each field in how good a trial is (PED-ANOVA, arXiv:2304.10255); empty after few trials."""
    if ended < MIN_TRIALS:
        return {}
    return {path: float(share) for path, share in optuna.importance.get_param_importances(study).items()}
