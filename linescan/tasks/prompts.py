"""Prompts of detectors: words, and their embeddings from a file or from CLIP's text encoder.

A file of embeddings has `vectors` (n, dim) and `names`: an `.npz` as an array of text, a `.safetensors` as a JSON list
in its metadata. Nothing in it is run.
"""

import json
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import fit
from ..engine.atomic import atomic
from ..engine.progress import progress_bar
from ..errors import InputError, one_line
from ..extras import require

__all__ = ["CLIP", "encode", "parse_prompts", "pick", "read_embeddings", "write_embeddings"]

CLIP = "openai/clip-vit-base-patch32"
"""The text encoder of YOLO-World, by its name on the Hugging Face Hub."""

OPEN_CLIP = "open_clip:"
TOGETHER = 128  # prompts in one forward pass


def parse_prompts(text: str | Sequence[str]) -> list[str]:
    """ "cat, red car" -> ["cat", "red car"]; several texts follow each other. What is there twice is taken once.

    Raises:
        InputError: no word at all.
    """
    texts = [text] if isinstance(text, str) else text
    words = [" ".join(part.split()) for one in texts for part in one.split(",")]
    if not any(words):
        raise InputError("prompts are words separated by commas, as in 'cat, red car'")
    return list(dict.fromkeys(filter(None, words)))


# -- files ------------------------------------------------------------------------------------------------------------


def read_embeddings(path: str | Path) -> tuple[list[str], Tensor]:
    """The names in a file of embeddings, and their vectors (n, dim).

    Raises:
        InputError: the file is missing or damaged, or is none of embeddings.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                names, vectors = arrays["names"].tolist(), torch.from_numpy(arrays["vectors"])
        else:
            with safetensors.safe_open(path, "pt") as file:
                names, vectors = json.loads((file.metadata() or {})["names"]), file.get_tensor("vectors")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # zip, numpy, safetensors and json have many
        raise InputError(
            f"{path} holds no embeddings ({one_line(error)}): an .npz of `names` and `vectors`, or a .safetensors with "
            "the names in its metadata"
        ) from None
    words = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not words or vectors.ndim != 2 or len(vectors) != len(names) or not vectors.is_floating_point() or not names:
        raise InputError(f"{path}: `names` are n texts, and `vectors` (n, dim) floats")
    if not vectors.isfinite().all():
        raise InputError(f"{path}: a vector is not finite")
    return names, vectors.float()


def write_embeddings(path: str | Path, names: Sequence[str], vectors: Tensor) -> None:
    """Writes a file that `read_embeddings` reads, `.npz` or `.safetensors`; it is whole or absent.

    Raises:
        InputError: another ending.
    """
    path, vectors = Path(path), vectors.detach().float().cpu().contiguous()
    if path.suffix not in (".npz", ".safetensors"):
        raise InputError(f"embeddings are an .npz or a .safetensors, not {path.name!r}")
    with atomic(path) as file:
        if path.suffix == ".npz":
            np.savez(file, names=np.array(list(names)), vectors=vectors.numpy())
        else:
            file.write(safetensors.torch.save({"vectors": vectors}, metadata={"names": json.dumps(list(names))}))


def pick(prompts: Sequence[str], names: Sequence[str], vectors: Tensor, source: str | Path) -> Tensor:
    """The vectors of `prompts` among those of `names`, in their order.

    Raises:
        InputError: a prompt is not there; near names are given.
    """
    at = {name: i for i, name in enumerate(names)}
    for prompt in prompts:
        if prompt not in at:
            near = get_close_matches(prompt, names, 3)
            raise InputError(f"{source} has no {prompt!r}; " + (f"near it: {', '.join(near)}" if near else
                             f"it has {', '.join(names[:3])}{', ...' * (len(names) > 3)}"))  # fmt: skip
    return vectors[[at[prompt] for prompt in prompts]]


# -- CLIP -------------------------------------------------------------------------------------------------------------


def encode(prompts: Sequence[str], encoder: str = CLIP, state: dict[str, Tensor] | None = None) -> Tensor:
    """Embeddings (n, dim) of unit length of n prompts.

    Args:
        prompts: texts; as published without a template around them.
        encoder: a CLIP of `transformers`, by its name on the Hub or its folder; or of `open_clip` as
            "open_clip:MODEL/WEIGHTS", such as "open_clip:ViT-B-32/openai" or "open_clip:ViT-B-32/my/weights.pt", or
            with "hf-hub:ORGANISATION/NAME" or "local-dir:FOLDER" after the colon.
        state: weights of the text encoder by the names that `transformers` has for them, over those of `encoder`.

    Raises:
        InputError: the package is missing, the encoder cannot be opened, or `state` is not for it.
    """
    if encoder.startswith(OPEN_CLIP):
        if state is not None:
            raise InputError("the weights of a text encoder in a detector's file are for one of `transformers`")
        run = _of_open_clip(encoder.removeprefix(OPEN_CLIP))
    else:
        run = _of_transformers(encoder, state)
    parts = []
    with torch.inference_mode(), progress_bar("reading prompts", len(prompts), show=len(prompts) > TOGETHER) as advance:
        for i in range(0, len(prompts), TOGETHER):
            parts.append(run(list(prompts[i : i + TOGETHER])).float())
            advance(len(parts[-1]))
    return F.normalize(torch.cat(parts), dim=-1).clone()


Encoder = Callable[[list[str]], Tensor]


def _of_transformers(name: str, state: dict[str, Tensor] | None) -> Encoder:
    require("transformers", "text")
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    with _opening(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = CLIPTextModelWithProjection.from_pretrained(name, weights_only=True).eval()
    if state is not None:
        state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
        fit(model, state, name, name="text encoder")

    def run(prompts: list[str]) -> Tensor:
        return model(**tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")).text_embeds

    return run


def _of_open_clip(name: str) -> Encoder:
    architecture, _, weights = name.partition("/")
    if name.startswith(("hf-hub:", "local-dir:")):  # these have their own weights
        architecture, weights = name, None
    elif not (architecture and weights):
        raise InputError(f"{OPEN_CLIP}{name} has no weights; {OPEN_CLIP}ViT-B-32/openai has, or a file in their place")
    require("open_clip", "text")
    import open_clip

    with _opening(name):
        model, _, _ = open_clip.create_model_and_transforms(architecture, weights, weights_only=True)
        tokenizer = open_clip.get_tokenizer(architecture)
    model.eval()
    return lambda prompts: model.encode_text(tokenizer(prompts))


@contextmanager
def _opening(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # both packages raise errors of many kinds
        raise InputError(
            f"cannot open the text encoder {name}: {one_line(error)}; --text-encoder names another, or a folder with "
            "one; --embeddings takes a file of embeddings"
        ) from error
