"""Which layer of an encoder a parameter belongs to, told by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

# "blocks.3.1." of "trunk.blocks.3.1.conv.weight": numbers that follow each other name one block.
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?:\.\d+)*\.")
# open_clip's transformers register their output projection before everything else.
_LAST = re.compile(r"(?:.*\.)?(?:proj|head\..*)")


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """Number the layers of an encoder, from its input to its output.

    Each numbered block is a layer. What comes before the first one, such as a stem and embeddings,
    is layer 0; what comes after, such as a last norm and the projection, is the last layer.

    Args:
        names: Names of parameters, in the order of the module.

    Returns:
        The layer of each parameter, by name.

    Example:
        >>> layer_depths(["proj", "conv.weight", "blocks.0.w", "blocks.1.w", "norm.weight"])
        {'proj': 3, 'conv.weight': 0, 'blocks.0.w': 1, 'blocks.1.w': 2, 'norm.weight': 3}
    """
    blocks: dict[str, int] = {}
    found: dict[str, int | None] = {}
    for name in names:
        block = _BLOCK.match(name)
        if block:
            found[name] = blocks.setdefault(block[0], len(blocks) + 1)
        else:
            found[name] = None if blocks or _LAST.fullmatch(name) else 0
    return {name: len(blocks) + 1 if depth is None else depth for name, depth in found.items()}
