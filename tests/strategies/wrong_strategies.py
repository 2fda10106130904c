"""Recipes that are wrong, and what `edgekd check` has to say about each."""

from __future__ import annotations

from typing import Any

from tiny_strategies import MOBILE, SMALL, distill, recipe

TEACHER = {"model": SMALL, "epochs": 1}
BOTH = [TEACHER, TEACHER]
TWO = [{"model": SMALL}, {"model": MOBILE}]
OTHER = {"use": "tiny-digits", "begin": 1}
CE_ONLY = ["ce"]
QUANTIZE = {"use": "quantize", "heal": {"epochs": 0}}
NORMALISED = {"normalize": {"mean": [0.3], "std": [0.35]}}


def hint(student: str, teacher: str) -> dict[str, Any]:
    return {"use": "hint", "student": student, "teacher": teacher}


def kl(**more: Any) -> list[Any]:
    return ["ce", {"use": "kl", **more}]


def ensemble(combine: str, **more: Any) -> dict[str, Any]:
    return {"use": "ensemble", "combine": combine, **more}


def knows(*classes: str) -> dict[str, Any]:
    return {**TEACHER, "classes": list(classes)}


#: what is wrong: recipe, place, what is said, hint
WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a tap of the student": (
        recipe(TEACHER, distill(objectives=["ce", hint("layer7", "layer2")])),
        *("stage[0].objectives[1].student", "no module 'layer7' to tap", "at the top: conv1, bn1, layer1, layer2"),
    ),
    "a tap of the teacher": (
        recipe(TEACHER, distill(objectives=["ce", hint("layer2", "layr2")])),
        *("stage[0].objectives[1].teacher", "no module 'layr2' to tap", "did you mean 'layer2'"),
    ),
    "a teacher with other outputs": (
        recipe({"model": {**SMALL, "num_classes": 7}, "epochs": 1}, distill()),
        *("teacher.model", "gives [2, 7] for 2 images, expected [2, 10]", "10 classes"),
    ),
    "a teacher of a class that is not there": (
        recipe([TEACHER, knows("1", "eleven")], distill(source="ensemble")),
        *("teacher[1].classes", "the data have no class 'eleven'", "known: 0, 1"),
    ),
    "a teacher of one class twice": (
        recipe([TEACHER, knows("1", "1")], distill(source="ensemble")),
        *("teacher[1].classes", "names one class twice", "once"),
    ),
    "classes that no teacher knows": (
        recipe([knows("1", "2"), knows("2", "3")], distill(source="ensemble")),
        *("stage[0].source", "7 of 10 classes are known to no teacher", "add a teacher"),
    ),
    "one teacher of some classes": (
        recipe(knows("1", "2"), distill()),
        *("stage[0].source", "does not know all classes", "source = 'ensemble'"),
    ),
    "random teachers of some classes": (
        recipe([TEACHER, knows("1", "2")], distill(source=ensemble("random"))),
        *("stage[0].source.combine", "needs teachers that know all classes", "'confidence'"),
    ),
    "two teachers where one is asked": (
        recipe(BOTH, distill()),
        *("stage[0].source", "takes one teacher, got 2", "source = 'ensemble'"),
    ),
    "an unknown source": (
        recipe(TEACHER, distill(source="frozn")),
        *("stage[0].source", "no teachers called 'frozn'", "did you mean 'frozen'?"),
    ),
    "an unknown combination": (
        recipe(BOTH, distill(source=ensemble("avg"))),
        *("stage[0].source.combine", "input should be 'mean', 'fixed'", "how their answers become one"),
    ),
    "weights of the wrong count": (
        recipe(BOTH, distill(source=ensemble("fixed", weights=[1.0]))),
        *("stage[0].source.weights", "1 weights for 2 teachers", "one per teacher"),
    ),
    "a negative weight of a teacher": (
        recipe(BOTH, distill(source=ensemble("fixed", weights=[1.0, -1.0]))),
        *("stage[0].source.weights[1]", "greater than or equal to 0, got -1.0", "one per teacher"),
    ),
    "weights that nobody looks at": (
        recipe(BOTH, distill(source=ensemble("mean", weights=[1.0, 1.0]))),
        *("stage[0].source.weights", "takes no weights, combine is 'mean'", "combine = 'fixed'"),
    ),
    "accuracy without a validation split": (
        recipe(BOTH, distill(source=ensemble("accuracy")), data={"validation": 0}),
        *("stage[0].source.combine", "or there are none", "'confidence'"),
    ),
    "fewer teachers than data sets": (
        recipe(BOTH, distill(source=ensemble("source"), mix=[OTHER, {**OTHER, "begin": 2}])),
        *("stage[0].source.combine", "2 teachers for 3 data sets", "one for each"),
    ),
    "a schedule longer than the training": (
        recipe(TEACHER, distill(objectives=kl(weight={"use": "linear", "epochs": 5}), epochs=3)),
        *("stage[0].objectives[1].weight.epochs", "goes on to epoch 5, the training has 3", "leave epochs out"),
    ),
    "a temperature that waits too long": (
        recipe(TEACHER, distill(objectives=kl(tau={"use": "cosine", "start": 4, "end": 1, "after": 2}))),
        *("stage[0].objectives[1].tau.epochs", "goes on to epoch 2, the training has 1", "leave epochs out"),
    ),
    "a negative weight": (
        recipe(TEACHER, distill(objectives=kl(weight=-0.5))),
        *("stage[0].objectives[1].weight", "greater than or equal to 0, got -0.5", "a number from 0 up"),
    ),
    "a temperature of nothing": (
        recipe(TEACHER, distill(objectives=kl(tau=0))),
        *("stage[0].objectives[1].tau", "greater than 0, got 0", "above 0"),
    ),
    "a temperature that ends at nothing": (
        recipe(TEACHER, distill(objectives=kl(tau={"use": "linear"}))),
        *("stage[0].objectives[1].tau", "linear can become 0", "above 0"),
    ),
    "an unknown rule": (
        recipe(TEACHER, distill(objectives=kl(weight={"use": "liner"}))),
        *("stage[0].objectives[1].weight", "no rules called 'liner'", "did you mean 'linear'?"),
    ),
    "a weight per image of what has one figure per batch": (
        recipe(TEACHER, distill(objectives=["ce", {"use": "rkd", "weight": {"use": "disagreement"}}])),
        *("stage[0].objectives[1].weight", "rkd gives one number for the whole batch", "a number or a schedule"),
    ),
    "one tap where two are compared": (
        recipe(TEACHER, distill(objectives=["ce", {"use": "crd", "student": "layer3"}])),
        *("stage[0].objectives[1].teacher", "give both taps or neither", "logits are compared"),
    ),
    "a head that is not there": (
        recipe(TEACHER, distill(objectives=kl(on="parity"))),
        *("stage[0].objectives[1].on", "no head 'parity'", "logits"),
    ),
    "a source that no objective asks": (
        recipe(TEACHER, distill(objectives=CE_ONLY, source="ema")),
        *("stage[0].source", "no objective asks a teacher", 'use = "kl"'),
    ),
    "a pool that overlaps the test set": (
        recipe(TEACHER, distill(unlabelled={"use": "tiny-digits", "leaking": True})),
        *("stage[0].unlabelled", "60 of its images are in the test split", "take them out"),
    ),
    "a pool of other images": (
        recipe(TEACHER, distill(unlabelled={"use": "tiny-digits", "size": 8})),
        *("stage[0].unlabelled", "images differ from the main data's: 1x8x8", "resize one of them"),
    ),
    "a pool that cannot be loaded": (
        recipe(TEACHER, distill(unlabelled={"use": "image-folder", "root": "nowhere", "size": 16})),
        *("stage[0].unlabelled", "nowhere", "hint"),
    ),
    "a pool that nobody learns from": (
        recipe(TEACHER, distill(objectives=CE_ONLY, unlabelled=OTHER)),
        *("stage[0].unlabelled", "every objective looks at labels", 'use = "kl"'),
    ),
    "a threshold that none can reach": (
        recipe(TEACHER, distill(unlabelled={**OTHER, "threshold": 1.0})),
        *("stage[0].unlabelled.threshold", "less than 1, got 1.0", "largest probability"),
    ),
    "a mix with the test set": (
        recipe(TEACHER, distill(mix=[OTHER, {"use": "tiny-digits", "leaking": True}])),
        *("stage[0].mix[1]", "60 of its images are in the test split", "take them out"),
    ),
    "a mix with the validation split": (
        recipe(TEACHER, distill(mix=[{"use": "tiny-digits"}])),
        *("stage[0].mix[0]", "24 of its images are in the validation split", "validation split of your own"),
    ),
    "a mix of other classes": (
        recipe(TEACHER, distill(mix=[{**OTHER, "names": ["1", "2"]}])),
        *("stage[0].mix[0]", "has 2 classes (1, 2, ...)", 'on = "NAME"'),
    ),
    "a mix for a head that nobody trains": (
        recipe(TEACHER, distill(mix=[{**OTHER, "on": "other"}])),
        *("stage[0].mix[0].on", "no objective is for the head 'other'", 'on = "other"'),
    ),
    "a mix augmented otherwise": (
        recipe(TEACHER, distill(mix=[OTHER, {**OTHER, "begin": 2, "augment": "flip"}])),
        *("stage[0].mix[1].augment", "is that of the main data", "data.augment"),
    ),
    "a pool normalised otherwise": (
        recipe(TEACHER, distill(unlabelled={**OTHER, **NORMALISED})),
        *("stage[0].unlabelled.normalize", "is that of the main data", "data.normalize"),
    ),
    "a mix beside a cache": (
        recipe(TEACHER, distill(source="cached", mix=[OTHER])),
        *("stage[0].source", "a cached teacher has not seen the further images", "'frozen'"),
    ),
    "a mixture beside a cache": (
        recipe(TEACHER, distill(source="cached"), data={"augment": "cutmix"}),
        *("stage[0].source", "has not seen the images that CutMix makes", "'frozen'"),
    ),
    "a cache of chance": (
        recipe(BOTH, distill(source={"use": "cached", "of": ensemble("random")})),
        *("stage[0].source.of", "answers anew each time", "frozen"),
    ),
    "features from a cache": (
        recipe(TEACHER, distill(source="cached", objectives=["ce", hint("layer2", "layer2")])),
        *("stage[0].objectives[1].teacher", "gives logits only, not 'layer2'", "source = 'frozen'"),
    ),
    "peers with one student": (
        recipe(TEACHER, distill(source="peers")),
        *("stage[0].source", "peers are two students or more", "students = [{ ... }, { ... }]"),
    ),
    "features of peers": (
        recipe(TEACHER, distill(students=TWO[:1] * 2, source="peers", objectives=[hint("layer2", "layer2")])),
        *("stage[0].objectives[0].teacher", "gives logits only", "objectives on logits"),
    ),
    "peers that heal": (
        recipe(TEACHER, distill(), {"use": "prune", "target": {"macs": 0.5}, "heal": {"epochs": 1, "source": "peers"}}),
        *("stage[1].heal.source", "peers are two students or more", "students"),
    ),
    "a student of other images": (
        recipe(TEACHER, distill(students=[TWO[0], {"model": {**SMALL, "in_channels": 3}}])),
        *("stage[0].students[1].model", "cifar-resnet fails on images [2, 1, 16, 16]", "number of channels"),
    ),
    "students of one name": (
        recipe(TEACHER, distill(students=[{"name": "2", "model": SMALL}, {"model": SMALL}])),
        *("stage[0].students", "two students have the same name", "different ones"),
    ),
    "a student's name that is no name": (
        recipe(TEACHER, distill(students=[{"name": "a.b", "model": SMALL}])),
        *("stage[0].students[0].name", "should match pattern", "distill.NAME"),
    ),
    "a student from nowhere": (
        recipe(TEACHER, distill(students=[{"start": "techer"}, {"model": SMALL}])),
        *("stage[0].students[0].start", "no earlier stage and no artifact 'techer'", "did you mean 'teacher'?"),
    ),
    "a student with two beginnings": (
        recipe(TEACHER, distill(students=[{"start": "teacher", "model": SMALL}, {"model": SMALL}])),
        *("stage[0].students[0]", "needs either model or start", "model = "),
    ),
    "a model beside students": (
        recipe(TEACHER, distill(students=TWO, model=SMALL)),
        *("stage[0].students", "stands beside model", "among the students"),
    ),
    "an unknown teacher": (
        recipe(TEACHER, distill(teacher="distil"), distill()),
        *("stage[0].teacher", "no earlier stage and no artifact 'distil'", "teacher"),
    ),
    "a teacher that comes later": (
        recipe(TEACHER, distill(teacher="distill-2"), distill()),
        *("stage[0].teacher", "no earlier stage and no artifact 'distill-2'", "known: teacher"),
    ),
    "a quantized teacher": (
        recipe(TEACHER, distill(), QUANTIZE, {"use": "distill", "after": "distill", "teacher": "quantize"}),
        *("stage[2].teacher", "quantize holds no float network", "the stage before it"),
    ),
    "a stage to go on from": (
        recipe(TEACHER, distill(), {"use": "fuse", "after": "nobody"}),
        *("stage[1].after", "no earlier stage and no artifact 'nobody'", "known: distill, teacher"),
    ),
    "the average of one": (
        recipe(TEACHER, distill(), {"use": "average"}),
        *("stage[1].members", "needs two students or more, got 1", "distill.a"),
    ),
    "the average of one with itself": (
        recipe(TEACHER, distill(), {"use": "average", "members": ["distill", "distill"]}),
        *("stage[1].members", "names one student twice", "distill.a"),
    ),
    "the average of a stranger": (
        recipe(TEACHER, distill(), {"use": "average", "members": ["distill", "distill.b"]}),
        *("stage[1].members", "no earlier stage and no artifact 'distill.b'", "did you mean 'distill'?"),
    ),
    "fusing without a validation split": (
        recipe(TEACHER, distill(), {"use": "fuse"}, data={"validation": 0}),
        *("stage[1]", "no validation split to choose by", "data.validation = 0.1"),
    ),
    "a fusion of averages": (
        recipe(TEACHER, distill(), {"use": "fuse", "ema": 0.99}),
        *("stage[1].ema", "averages already", "leave out ema"),
    ),
    "patience without a validation split": (
        recipe(TEACHER, distill(patience=2), data={"validation": 0}),
        *("stage[0].patience", "no validation split to judge by", "data.validation = 0.1"),
    ),
    "an attack that nobody looks at": (
        recipe(TEACHER, distill(attack={"use": "fgsm"})),
        *("stage[0].attack", "no objective looks at what the attack makes", 'input = "adversarial"'),
    ),
    "adversarial input without an attack": (
        recipe(TEACHER, distill(objectives=kl(input="adversarial"))),
        *("stage[0].attack", "no attack makes it", 'attack = { use = "pgd" }'),
    ),
    "an attack larger than an image": (
        recipe(TEACHER, distill(objectives=kl(input="adversarial"), attack={"use": "fgsm", "eps": 8})),
        *("stage[0].attack.eps", "less than or equal to 1, got 8", "images are in [0, 1]"),
    ),
    "half precision on a CPU": (
        recipe(TEACHER, distill(precision="fp16")),
        *("stage[0].precision", "fp16 trains on GPUs only", "'auto'"),
    ),
    "a training of no epochs": (
        recipe(TEACHER, distill(epochs=0)),
        *("stage[0].epochs", "must be at least 1, got 0", "how often"),
    ),
}  # fmt: skip
