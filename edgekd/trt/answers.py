"""Whether an engine computes what its file says: its outputs beside those of ONNX Runtime on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import StageError
from ..runtimes import Feed, Session

__all__ = ["LIMITS", "Agreement", "agreement", "outputs_of"]

#: Largest root mean square of the difference, as a share of the outputs' own. fp32 engines may use TF32, whose
#: mantissa has 10 bits; fp16 has the same 10; int8 rounds in other places, and one step of a range is 1/255 of it.
LIMITS = {"fp32": 0.01, "fp16": 0.02, "bf16": 0.1, "int8": 0.1, "int8-fp16": 0.1}


@dataclass(frozen=True)
class Agreement:
    """`difference` as LIMITS has it, of the worst output; `same_answers` is the share of rows with the same argmax."""

    difference: float
    same_answers: float
    rows: int


def agreement(found: Feed, expected: Feed, precision: str, where: str) -> Agreement:
    """How near outputs [N, ...] are to the expected ones.

    Raises StageError for outputs that are all zero, NaN or infinite (a wrong engine often gives those, without any
    error), of another shape, or further away than their precision explains.
    """
    difference, same, rows = 0.0, 1.0, 0
    for name, wanted in expected.items():
        if name not in found or found[name].shape != wanted.shape:
            shape = list(found[name].shape) if name in found else "missing"
            raise _wrong(f"output {name!r} is {shape}, expected {list(wanted.shape)}", where)
        values, reference = found[name].astype(np.float64), wanted.astype(np.float64)
        if broken := int((~np.isfinite(values)).sum()):
            raise _wrong(f"output {name!r} has {broken} of {values.size} values NaN or infinite", where)
        if not values.any() and reference.any():
            raise _wrong(f"output {name!r} is zero everywhere", where)
        scale = float(np.sqrt(np.square(reference).mean()))
        error = float(np.sqrt(np.square(values - reference).mean()))
        difference = max(difference, error / scale if scale else error)
        rows = len(values)
        if values.ndim == 2:
            same = min(same, float((values.argmax(1) == reference.argmax(1)).mean()))
    if difference > LIMITS[precision]:
        raise _wrong(
            f"outputs differ by {difference:.1%} of their size from ONNX Runtime's on {rows} inputs, "
            f"{LIMITS[precision]:.0%} is what {precision} explains; {same:.1%} of the answers are the same",
            where,
        )
    return Agreement(difference, same, rows)


def _wrong(what: str, where: str) -> StageError:
    hint = "the engine is not kept; build the fp32 file to see which layers are wrong, or another optimization_level"
    return StageError(f"the engine computes something else: {what}", where=where, hint=hint)


def outputs_of(session: Session, inputs: Feed, batch: int) -> Feed:
    """Outputs [N, ...] of all rows of the inputs [N, ...], `batch` at a time; the last ones are filled up."""
    rows = len(next(iter(inputs.values())))
    types = {info.name: info.dtype for info in session.inputs}
    parts: list[Feed] = []
    for start in range(0, rows, batch):
        chosen = np.minimum(np.arange(start, start + batch), rows - 1)
        parts.append(session.run({name: array[chosen].astype(types[name]) for name, array in inputs.items()}))
    return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}
