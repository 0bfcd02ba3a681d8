"""Words for WordNet ids, the names of classes in several copies of ImageNet and its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cl_merge.errors import InputError


def wordnet_names(ids: Sequence[str]) -> list[str]:
    """Name classes that a data set calls by their WordNet ids.

    For the thousand classes of ImageNet these are the names of CLIP's authors, which open_clip
    comes with; for others, and where two of the given ids have the same, the first synonym of
    WordNet, from timm.

    Args:
        ids: Such as ``"n02084071"``.

    Raises:
        InputError: If one is no id that timm knows.

    Example:
        >>> wordnet_names(["n01443537", "n02129165"])
        ['goldfish', 'lion']
    """
    import timm.data
    from open_clip import IMAGENET_CLASSNAMES

    info: Any = timm.data
    every = info.ImageNetInfo("imagenet-22k")
    known = set(every.label_names())
    for name in ids:
        if name not in known:
            raise InputError(
                f"class_names=wordnet, but a class is called '{name}'; expected WordNet ids, such "
                "as n02084071: give a list of names, or patterns to replace"
            )
    ours = dict(
        zip(info.ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True)
    )
    found = [ours.get(name) for name in ids]
    counts = Counter(found)
    return [
        word
        if word is not None and counts[word] == 1
        else str(every.label_name_to_description(name)).split(",")[0].strip()
        for word, name in zip(found, ids, strict=True)
    ]
