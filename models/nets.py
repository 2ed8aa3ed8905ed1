"""The two small classifiers that ``make.py`` trains: a CNN and a vision transformer for 32x32 RGB images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(
    inputs: int, outputs: int, kernel: int, act: nn.Module | None, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution without bias, its batch normalisation and, unless ``act`` is None, an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(conv, norm) if act is None else nn.Sequential(conv, norm, act)


class Residual(nn.Module):
    """The basic block of a ResNet: two 3x3 convolutions and the input added back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_bn(channels, channels, 3, nn.ReLU())
        self.second = conv_bn(channels, channels, 3, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum of the input and of what the block makes of it."""
        return torch.relu(x + self.second(self.first(x)))


class DepthwiseDown(nn.Sequential):
    """MobileNetV2's strided block: 1x1 expansion, 3x3 depthwise with stride 2, linear 1x1 projection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            conv_bn(inputs, outputs, 1, nn.ReLU6()),
            conv_bn(outputs, outputs, 3, nn.ReLU6(), stride=2, groups=outputs),
            conv_bn(outputs, outputs, 1, None),
        )


class TwoBranch(nn.Module):
    """An Inception-like block: a 1x1 and a 3x3 branch side by side, joined along the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.point = conv_bn(channels, channels // 2, 1, nn.ReLU())
        self.area = conv_bn(channels, channels // 2, 3, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return both branches' channels in one tensor."""
        return torch.cat([self.point(x), self.area(x)], dim=1)


class DigitsCNN(nn.Sequential):
    """A CNN with the layers that image classifiers are usually made of."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            conv_bn(3, 32, 3, nn.ReLU()),
            Residual(32),
            nn.MaxPool2d(2),
            DepthwiseDown(32, 64),
            Residual(64),
            TwoBranch(64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes),
        )


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.split = (-1, tokens, 3, heads, dim // heads)
        self.merged = (-1, tokens, dim)
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, each mixed from all the tokens' values."""
        query, key, value = torch.unbind(self.qkv(x).reshape(self.split).permute(2, 0, 3, 1, 4))
        weights = torch.softmax(query @ key.transpose(-2, -1) * self.scale, dim=-1)
        mixed: Tensor = self.out((weights @ value).transpose(1, 2).reshape(self.merged))
        return mixed


class EncoderBlock(nn.Module):
    """A pre-norm transformer block: attention, then a GELU perceptron, each around a residual."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after attention and perceptron."""
        attended: Tensor = x + self.drop(self.attention(self.norm1(x)))
        mixed: Tensor = attended + self.drop(self.mlp(self.norm2(attended)))
        return mixed


class DigitsTransformer(nn.Module):
    """A vision transformer without a class token: 8x8 patches of 4x4 pixels, averaged at the end."""

    def __init__(self, classes: int = 10, dim: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        tokens = 64
        self.patches = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.position = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, tokens) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        tokens = self.patches(image).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits
