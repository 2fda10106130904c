"""Your network and your data, as two functions that recipe.toml names."""

from sklearn.datasets import load_digits
from torch import nn, tensor, uint8
from torch.utils.data import TensorDataset


def network(num_classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in [(1, 32), (32, 64), (64, 64)]:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def data() -> dict:
    digits = load_digits()
    images, labels = tensor(digits.images * 15, dtype=uint8)[:, None], tensor(digits.target)
    return {
        "train": TensorDataset(images[:1400], labels[:1400]),
        "test": TensorDataset(images[1400:], labels[1400:]),
        "classes": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    }
