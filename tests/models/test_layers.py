"""Which layer of an encoder a parameter belongs to, for the towers that come with open_clip."""

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

import cl_merge.models.towers  # noqa: F401 - registers the tower of the embedded model
from cl_merge.models.classifier import layer_depths


def vit():
    """ViT-B-16 but for its width: the same names."""
    return VisionTransformer(32, 16, width=16, layers=12, heads=2, mlp_ratio=4, output_dim=8)


def resnet():
    return ModifiedResNet([3, 4, 6, 3], output_dim=8, heads=2, image_size=64, width=8)


def timm_vit():
    with torch.device("cpu"):  # older versions of timm cannot make one without values
        return TimmModel("vit_tiny_patch16_224", 8, image_size=32, proj="linear")


TOWERS = {
    "ViT-B-16": vit,
    "RN50": resnet,
    "timm ViT": timm_vit,
    "lite": lambda: TimmModel("efficientnet_lite0", 8, image_size=32, proj="linear"),
    "glyph": lambda: TimmModel("glyph_resnet", 8, image_size=32, proj="linear"),
}

# By tower: the number of blocks, and for a few names the layer.
EXPECTED = {
    "ViT-B-16": (
        12,
        {
            "conv1.weight": 0,
            "class_embedding": 0,
            "positional_embedding": 0,
            "ln_pre.weight": 0,
            "transformer.resblocks.0.attn.in_proj_weight": 1,
            "transformer.resblocks.11.mlp.c_proj.bias": 12,
            "ln_post.weight": 13,
            "proj": 13,
        },
    ),
    "RN50": (
        16,
        {
            "conv1.weight": 0,
            "bn3.bias": 0,
            "layer1.0.conv1.weight": 1,
            "layer1.0.downsample.0.weight": 1,
            "layer1.2.bn3.weight": 3,
            "layer2.0.conv1.weight": 4,
            "layer4.2.conv3.weight": 16,
            "attnpool.positional_embedding": 17,
            "attnpool.c_proj.weight": 17,
        },
    ),
    "timm ViT": (
        12,
        {
            "trunk.cls_token": 0,
            "trunk.pos_embed": 0,
            "trunk.patch_embed.proj.weight": 0,
            "trunk.blocks.0.norm1.weight": 1,
            "trunk.blocks.11.mlp.fc2.bias": 12,
            "trunk.norm.weight": 13,
            "head.proj.weight": 13,
        },
    ),
    "lite": (
        16,
        {
            "trunk.conv_stem.weight": 0,
            "trunk.bn1.weight": 0,
            "trunk.blocks.0.0.conv_dw.weight": 1,
            "trunk.blocks.1.0.conv_pw.weight": 2,
            "trunk.blocks.1.1.conv_pw.weight": 3,
            "trunk.blocks.6.0.conv_pwl.weight": 16,
            "trunk.conv_head.weight": 17,
            "trunk.bn2.bias": 17,
            "head.proj.weight": 17,
        },
    ),
    "glyph": (
        5,
        {
            "trunk.stem.weight": 0,
            "head.proj.weight": 6,
        },
    ),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_each_block_is_a_layer_between_the_stem_and_what_stands_behind(tower):
    with torch.device("meta"):
        names = [f"visual.{name}" for name, _ in TOWERS[tower]().named_parameters()]
    depths = layer_depths(names)
    blocks, some = EXPECTED[tower]
    assert list(depths) == names
    assert {name: depths[f"visual.{name}"] for name in some} == some
    assert set(depths.values()) == set(range(blocks + 2))
    # Layers follow each other as the modules do; own parameters of a module come before its parts.
    inner = [depth for depth in depths.values() if 0 < depth <= blocks]
    assert inner == sorted(inner)


def test_an_encoder_without_blocks_has_a_first_and_a_last_layer():
    assert layer_depths(["visual.stem.weight", "visual.proj"]) == {
        "visual.stem.weight": 0,
        "visual.proj": 1,
    }


def test_of_no_names_there_are_no_layers():
    assert layer_depths([]) == {}
