"""A fleet of three students in one pass against three trainings, one after the other.

    python benchmarks/fleet.py

A ResNet-56 teaches a ResNet-20, a ResNet-14 and a ResNet-8 online (`source = "frozen"`), in edgekd's training loop:
one learner with all three, and three learners with one each. Both train the same networks on the same batches with
crop and flip; the fleet loads a batch and asks the teacher once, the three do so each for themselves. Blocks of steps
take turns in one process; ratios are taken round by round. A step of "separate" is one step of each of the three.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from blocks import OBJECTIVES, SEED, in_turn, network, noise, options_of, parsed, ratio, spread, steps, watched

from edgekd.data import Dataset, augmentations
from edgekd.learner import Learner, Student
from edgekd.models import count
from edgekd.precision import keep_freed_memory
from edgekd.recipe import DataSpec

TEACHER, STUDENTS = 56, (20, 14, 8)


def arithmetic(size: tuple[int, int, int]) -> float:
    """The share of the multiplications that remain: a backward pass costs two forward ones, the teacher has none."""
    asked = count(network(TEACHER), size)[1]
    learnt = 3 * sum(count(network(depth), size)[1] for depth in STUDENTS)
    return (asked + learnt) / (len(STUDENTS) * asked + learnt)


def one_block_each(separate: list[Iterator[None]], block: int) -> Iterator[None]:
    """Steps of separate trainings: each takes a whole block, as it would alone; the last one's count as steps."""
    while True:
        for training in separate[:-1]:
            for _ in range(block):
                next(training)
        for _ in range(block):
            yield next(separate[-1])


def main() -> None:
    options = parsed(options_of(__doc__, rounds=16, count=20, out="fleet.json"))
    keep_freed_memory()
    write = watched()
    augment = augmentations(DataSpec.model_validate({"use": "cifar10", "augment": ["crop-flip"]}))
    data: Dataset = noise(20 * options.batch)
    torch.manual_seed(SEED)
    teacher = network(TEACHER)
    students = {f"resnet{depth}": network(depth) for depth in STUDENTS}
    example = torch.zeros(2, *data.size)

    def learner(*names: str) -> Learner:
        made = [Student(copy.deepcopy(students[name]), OBJECTIVES, name) for name in names]
        return Learner.fleet(made, [copy.deepcopy(teacher)], example=example)

    alone = [steps(learner(name), data, options.batch, augment) for name in students]
    contenders = {
        "fleet": steps(learner(*students), data, options.batch, augment),
        "separate": one_block_each(alone, options.steps),
    }
    taken = in_turn(contenders, options.rounds, options.steps)
    document = {
        "teacher": f"ResNet-{TEACHER}",
        "students": [f"ResNet-{depth}" for depth in STUDENTS],
        "fleet_over_separate": {**ratio(taken, "fleet", "separate"), "target": 0.75},
        "multiplications_alone": round(arithmetic(data.size), 4),
        "ms_per_step": spread(taken),
    }
    write(options, document)


if __name__ == "__main__":
    main()
