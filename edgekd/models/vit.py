"""A small vision transformer (Dosovitskiy et al. 2021) for 32x32 images: pre-norm, mean pooling, no class token."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register
from .dropout import Dropout, dropped

__all__ = ["ViT", "vit"]

_Positive = Annotated[int, Field(gt=0)]


@register("models", "vit")
def vit(
    patch: _Positive = 4,
    dim: _Positive = 96,
    depth: _Positive = 6,
    heads: _Positive = 3,
    mlp_ratio: Annotated[float, Field(gt=0)] = 2.0,
    num_classes: _Positive = 10,
    in_channels: _Positive = 3,
    image_size: _Positive = 32,
    dropout: Dropout = 0.0,
) -> ViT:
    """Small vision transformer; `dim` is a multiple of `heads`, `image_size` a multiple of `patch`."""
    if dim % heads:
        raise UsageError(f"dim {dim} is not a multiple of heads {heads}", where="model vit")
    if image_size % patch:
        raise UsageError(f"image_size {image_size} is not a multiple of patch {patch}", where="model vit")
    return ViT(patch, dim, depth, heads, int(dim * mlp_ratio), num_classes, in_channels, image_size, dropout)


class Attention(nn.Module):
    """Multi-head self-attention. The head size follows from `qkv`, so that a pruned `qkv` needs no other change."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, dim] -> the same."""
        head_dim = self.qkv.out_features // (3 * self.num_heads)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """patch_embed, pos_embed, blocks, norm, linear."""

    def __init__(
        self,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        num_classes: int,
        in_channels: int,
        image_size: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.patch_embed = nn.Conv2d(in_channels, dim, patch, patch)
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        x = self.norm(self.blocks(x)).mean(1)
        return self.linear(dropped(x, self.dropout, self.training))
