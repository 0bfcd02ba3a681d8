"""Pre-trained CLIP-style models by name: any of open_clip's, the embedded one, and `lite`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cl_merge.data.hub import HubError, Needs, asked, explained, size
from cl_merge.errors import InputError, nearest, unknown_name

log = logging.getLogger(__name__)

_FOLDER = "local-dir:"
_HUB = "hf-hub:"
_CONFIG = "open_clip_config.json"
_OWN_MODELS = ("glyph", "lite")

Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class Clip:
    """A pre-trained model and what goes with it.

    Attributes:
        name: What was asked for, such as ``"ViT-B-16:openai"``.
        model: An open_clip ``CLIP`` or ``CustomTextCLIP`` in evaluation mode. Its image tower,
            ``model.visual``, maps images ``[B, 3, image_size, image_size]`` to features ``[B, D]``:
            all that is needed once the head is made.
        tokenizer: Maps ``N`` texts to token numbers ``[N, L]`` for ``model.encode_text``.
        train_transform: Maps a PIL image to a float32 tensor, with open_clip's random crop.
        test_transform: The same without randomness.
        image_size: Height and width of the input, in pixels.
    """

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    train_transform: Callable[[Any], Any]
    test_transform: Callable[[Any], Any]
    image_size: int


def load_clip(model: str = "glyph", *, image_size: int | None = None) -> Clip:
    """Load a pre-trained CLIP-style model with its tokenizer and transforms.

    Weights are read safely: safetensors, or ``torch.load`` with ``weights_only=True``.

    Weights trained with QuickGELU, such as all of OpenAI's, get it whether or not the name of the
    architecture says so. For a tag, open_clip knows. A file gets it if its name contains
    ``openai``; otherwise name the architecture with its activation, as in
    ``ViT-B-16-quickgelu:/folder/weights.safetensors``. The choice is logged at level INFO.

    Args:
        model: One of

            - ``"glyph"``: the small model of characters that comes with this package;
            - ``"lite"``: EfficientNet-Lite0 and MiniLM-L6, see :mod:`cl_merge.models.lite`;
            - ``"ARCHITECTURE:TAG"``: weights that open_clip downloads, such as
              ``"ViT-B-16:openai"``;
            - ``"ARCHITECTURE:FILE"``: weights in a local file (``.safetensors``, ``.pt``, or
              ``.ckpt`` with a ``state_dict``), such as ``"ViT-B-16:/folder/weights.safetensors"``;
            - ``"local-dir:FOLDER"``: a folder with ``open_clip_config.json`` and the weights;
            - ``"hf-hub:OWNER/NAME"``: the same on the Hugging Face hub.
        image_size: Height and width of the input; without it, those of the pre-training. Position
            embeddings of open_clip's own towers are interpolated.

    Returns:
        The model in evaluation mode, on the CPU, in float32.

    Raises:
        InputError: If the architecture, tag, file or folder does not exist, weights are missing,
            unreadable, of another architecture or cannot be downloaded, or the image size is not
            possible.

    Example:
        >>> clip = load_clip("ViT-B-16:openai")  # doctest: +SKIP
        >>> features = clip.model.visual(clip.test_transform(image)[None])  # doctest: +SKIP

    Reference:
        Radford et al., CLIP, ICML 2021; Ilharco et al., OpenCLIP, 2021.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size={image_size}; expected 1 or more, in pixels")
    if model == "lite":
        from cl_merge.models.lite import build_lite

        made, tokenizer = build_lite(image_size)
    else:
        made, tokenizer = _create(model, resolve(model), image_size)
    from open_clip.transform import PreprocessCfg, image_transform_v2

    # What open_clip stores in the image tower.
    config = PreprocessCfg(**cast(Any, made.visual).preprocess_cfg)
    size = config.size if isinstance(config.size, int) else config.size[0]
    train, test = (image_transform_v2(config, is_train=random) for random in (True, False))
    return Clip(model, made, tokenizer, train, test, size)


class Source(NamedTuple):
    """Where open_clip finds a model."""

    config: str  # open_clip's name of the architecture, or local-dir: or hf-hub: and where
    weights: str | None = None  # a tag or a file; None if the config's folder has them
    quick_gelu: bool = False  # whether to force QuickGELU; if not, the config decides


def resolve(model: str) -> Source:
    """Find out what a name given to `load_clip` stands for; reads and downloads no weights."""
    if model == "glyph":
        return _folder_source(Path(str(files("cl_merge.models.glyph"))))
    if model.startswith(_FOLDER):
        return _folder_source(Path(model.removeprefix(_FOLDER)).expanduser())
    if model.startswith(_HUB):
        return Source(model)
    import open_clip

    name, _, weights = model.partition(":")
    architecture = name.replace("/", "-")  # OpenAI writes ViT-B/16
    known = open_clip.list_models()
    if architecture not in known:
        # Not `unknown_name`: it would list some 150 architectures.
        hint = nearest(architecture, [*_OWN_MODELS, *known])
        raise InputError(
            f"unknown model '{name}'{hint} Known: {', '.join(_OWN_MODELS)}, {_FOLDER}FOLDER, "
            "ARCHITECTURE:TAG and ARCHITECTURE:FILE with an architecture of open_clip.list_models()"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not weights:
        raise InputError(
            f"model '{model}' names no weights; give a tag, as in '{architecture}:"
            f"{tags[0] if tags else 'TAG'}', or a file, as in "
            f"'{architecture}:/folder/weights.safetensors'"
        )
    if open_clip.is_pretrained_cfg(architecture, weights):
        # open_clip knows which weights were trained with QuickGELU, but if the architecture has
        # plain GELU, it only warns: 'ViT-B-16' with 'openai' would lose much of its accuracy.
        quick_gelu = open_clip.get_pretrained_cfg(architecture, weights).get("quick_gelu", False)
        return Source(architecture, weights, quick_gelu)
    return _file_source(architecture, weights, tags)


def model_download(model: str) -> int:
    """Find out how much is to be downloaded before a model can be loaded; downloads nothing.

    Args:
        model: As for `load_clip`.

    Returns:
        Bytes; 0 if it is here.

    Raises:
        InputError: If there is no such model, here or on the hub, or the hub does not say.
    """
    if model == "lite":
        from cl_merge.models.lite import packaged_weights

        packaged_weights()
        return 0
    return _missing_bytes(resolve(model))


def _missing_bytes(source: Source) -> int:
    """How many bytes of a source are on the hub and not here; `HubError` if it does not say."""
    place = _hub_place(source)
    if place is None:
        return 0
    from huggingface_hub import HfApi, try_to_load_from_cache

    repository, names = place
    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
        return 0
    hub = HfApi()
    try:
        info = asked(lambda: hub.model_info(repository, files_metadata=True, timeout=20))
    # The clients raise errors of a dozen kinds, with those of several packages below them.
    except Exception as error:
        raise HubError(f"'{repository}': {explained(error)}.") from error
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    for name in names:
        if name in sizes:
            return int(sizes[name] or 0)
    raise HubError(f"'{repository}' on the hub has none of {', '.join(names)}.")


def _hub_place(source: Source) -> tuple[str, list[str]] | None:
    """The repository that open_clip reads weights from, and the names that their file may have."""
    import open_clip

    default = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    if source.config.startswith(_HUB):
        return source.config.removeprefix(_HUB), default
    if source.weights is None or not open_clip.is_pretrained_cfg(source.config, source.weights):
        return None
    config = open_clip.get_pretrained_cfg(source.config, source.weights)
    repository, _, name = str(config.get("hf_hub", "")).rpartition("/")
    if not repository:
        return None
    safe = f"{Path(name).stem}.safetensors"
    return repository, [safe, name] if name else default


def _folder_source(folder: Path) -> Source:
    if not folder.is_dir():
        raise InputError(f"model folder '{folder}' does not exist")
    if not (folder / _CONFIG).is_file():
        raise InputError(f"model folder '{folder}' has no {_CONFIG}")
    if not _weights_in(folder):
        raise InputError(
            f"model folder '{folder}' has no weights; expected open_clip_model.safetensors"
        )
    return Source(f"{_FOLDER}{folder}")


def _weights_in(folder: Path) -> list[Path]:
    """List the files that open_clip would take for weights."""
    endings = (".safetensors", ".bin", ".pth")
    return sorted(file for file in folder.iterdir() if file.suffix in endings)


def _file_source(architecture: str, path: str, tags: list[str]) -> Source:
    file = Path(path).expanduser()
    if file.is_dir():
        raise InputError(f"'{file}' is a folder; load a folder as '{_FOLDER}{file}'")
    if file.is_file():
        return Source(architecture, str(file), quick_gelu="openai" in file.name.lower())
    if file.suffix or file.parent != Path():
        raise InputError(f"weights file '{file}' of {architecture} does not exist")
    raise unknown_name(f"tag of {architecture}", path, tags)


def _create(name: str, source: Source, image_size: int | None) -> tuple[nn.Module, Tokenizer]:
    """Let open_clip make the model and read its weights."""
    import open_clip

    import cl_merge.models.towers  # noqa: F401 - a config may name one of these

    with _explained(f"cannot read the config of '{source.config}'"):
        config = open_clip.get_model_config(source.config)
    for file in _weights_files(name, source):
        _check_readable(file)
    size = "" if image_size is None else f" at image_size {image_size}"
    with _explained(f"cannot make model '{name}' from its weights{size}"):
        model = open_clip.create_model(
            source.config,
            source.weights,
            force_quick_gelu=source.quick_gelu,
            force_image_size=image_size,
            require_pretrained=True,
            weights_only=True,
        )
    with _explained(f"cannot load the tokenizer of model '{name}'"):
        tokenizer = open_clip.get_tokenizer(source.config)
    quick = source.quick_gelu or config.get("quick_gelu", False)
    log.info("loaded %s with %s", name, "QuickGELU" if quick else "GELU")
    return model.eval(), tokenizer


def _weights_files(name: str, source: Source) -> list[Path]:
    """List the files that hold the weights of a source, after downloading those of a tag."""
    import open_clip

    if source.config.startswith(_FOLDER):
        return _weights_in(Path(source.config.removeprefix(_FOLDER)))
    if source.weights is None:
        return []
    if not open_clip.is_pretrained_cfg(source.config, source.weights):
        return [Path(source.weights)]
    try:
        # open_clip would try for a minute where there is no network.
        if download := _missing_bytes(source):
            log.info("%s: %s to download", name, size(download))
            Needs(download, 0).check_disk(f"model '{name}'")
        config = open_clip.get_pretrained_cfg(source.config, source.weights)
        return [Path(open_clip.download_pretrained(config))]
    except (OSError, RuntimeError, HubError) as error:
        raise InputError(
            f"cannot download the weights of '{name}': {_one_line(error)} Without a connection, "
            f"fetch the file elsewhere and load it as '{source.config}:/folder/FILE'"
        ) from error


def _check_readable(file: Path) -> None:
    """Read what describes the tensors of a file, so that the error for a broken one names it."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix not in (".npz", ".npy"):  # those of big_vision: open_clip reads them alone
            with warnings.catch_warnings(action="ignore"):  # what torch warns of, it then refuses
                torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        # torch's own message is not passed on: it advises to load code along with the weights.
        raise InputError(
            f"weights file '{file}' is corrupt or no checkpoint; expected .safetensors, or tensors "
            "saved by torch.save (pickled code and TorchScript are not loaded, for safety)"
        ) from error


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn any error of a library into one line that says what failed."""
    try:
        yield
    # open_clip, timm, transformers and torch raise a dozen types of exceptions for wrong files.
    except Exception as error:
        raise InputError(f"{what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """The message of an error without line breaks, cut where lists of tensors go on."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
