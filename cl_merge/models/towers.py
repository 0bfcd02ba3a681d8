"""Image towers of our own, which an open_clip config can name once this module is imported."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

_GROUPS = 8
_STAGES = ((32, 1), (64, 2), (128, 2))  # channels and residual blocks; each halves the resolution

default_cfgs = generate_default_cfgs(
    {
        "glyph_resnet.untrained": {
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "num_classes": 0,
        }
    }
)


class GlyphResNet(nn.Module):
    """A small pre-activation residual network for 32-pixel images, without batch statistics.

    With group normalisation nothing but parameters changes in training, and an image's features do
    not depend on its batch. The arguments are those of timm: 0 classes leave the classifier out,
    ``global_pool=""`` the pooling.

    Reference: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016; Wu and He, Group
    Normalization, ECCV 2018.
    """

    def __init__(self, num_classes: int = 0, global_pool: str = "avg", in_chans: int = 3) -> None:
        super().__init__()
        width = _STAGES[0][0]
        self.num_features = _STAGES[-1][0]
        self.stem = nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False)
        self.stages = nn.Sequential()
        for stage, (out, depth) in enumerate(_STAGES):
            blocks = nn.Sequential()
            for index in range(depth):
                blocks.append(_Block(width, out, stride=2 if stage and not index else 1))
                width = out
            self.stages.append(blocks)
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace pooling and classifier, as timm's users and open_clip do."""
        self.num_classes = num_classes
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.global_pool = pool if global_pool else nn.Identity()
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute the last feature map, not negative: [B, num_features, height / 8, width / 8]."""
        return nn.functional.relu(self.norm(self.stages(self.stem(images))))

    def forward(self, images: Tensor) -> Tensor:
        """Compute pooled features [B, num_features], or logits where there is a classifier."""
        logits: Tensor = self.fc(self.global_pool(self.forward_features(images)))
        return logits


class _Block(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, at ``1 / stride`` of the resolution."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, width)
        self.conv1 = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        same = width == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.relu(self.norm1(x)))
        y = self.conv2(nn.functional.relu(self.norm2(y)))
        total: Tensor = self.shortcut(x) + y
        return total


@register_model
def glyph_resnet(pretrained: bool = False, **kwargs: Any) -> GlyphResNet:
    """Build the image tower of ``glyph``, with random weights, whatever timm passes."""
    model: GlyphResNet = build_model_with_cfg(GlyphResNet, "glyph_resnet", pretrained, **kwargs)
    return model
