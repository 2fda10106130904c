"""Where a student's targets come from: teacher sources.

A source is an `nn.Module` registered under the kind `teachers`, called as `source(batch, students) -> [outputs]`: one
dict of tensors per student, without gradient. Its `__init__` may name what edgekd fills in: `network` (the one
teacher), `networks` (all of them), `students` (the networks in training) and `taps` (module paths that objectives want
of the teacher). It may have

- `follow(students)`, called after every step of the optimizer; its state dict is then part of the checkpoint;
- `views`, when it repeats so many augmented views per image;
- `carries = False`, when later stages cannot go on with it: they ask the teacher itself.
"""

from .cached import Cached
from .ensemble import Ensemble
from .network import Frozen, Placed
from .own import MovingAverage, Peers, TeacherFree
from .spec import FILLED_IN, asks_network, make_source, source_of

__all__ = [
    "FILLED_IN",
    "Cached",
    "Ensemble",
    "Frozen",
    "MovingAverage",
    "Peers",
    "Placed",
    "TeacherFree",
    "asks_network",
    "make_source",
    "source_of",
]
