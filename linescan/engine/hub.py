"""Folders in the layout of the Hugging Face Hub: weights, configuration and model card."""

from pathlib import Path

import timm
from timm.models._hub import save_config_for_hf
from torch import nn

from .. import zoo
from ..errors import InputError
from .atomic import atomic, atomic_path
from .cards import ModelCard, save_model

__all__ = ["write_folder"]

_LICENCES = {"none": "unknown"}  # what the Hub calls them, where that is not the same in small letters


def write_folder(folder: str | Path, model: nn.Module, card: ModelCard, licence: str | None = None) -> list[Path]:
    """Writes model.safetensors, config.json and README.md; returns their paths.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads the folder, after `import linescan` for one of its
    models, and `huggingface-cli upload` pushes it. model.safetensors alone is a checkpoint for linescan.

    Args:
        folder: made if it is missing.
        model: a classifier of timm or linescan.
        card: of it.
        licence: of the weights; by default that of the published ones, and none for those that were trained further.

    Raises:
        InputError: it is not a classifier that timm can build.
    """
    if not timm.is_model(card.model.partition(".")[0]):
        raise InputError(f"{card.model} is not a classifier; only these have a folder that timm reads")
    if card.quantised:
        raise InputError("timm reads no quantised models; the file itself can be shared as it is")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, config, readme = (folder / file for file in ("model.safetensors", "config.json", "README.md"))
    save_model(weights, model, card)
    how = card.preprocess
    data = {"input_size": how.size, "mean": how.mean, "std": how.std, "interpolation": how.interpolation,
            "crop_pct": how.crop_pct, "crop_mode": how.crop_mode}  # fmt: skip
    args = {key: value for key, value in card.args.items() if key != "pretrained"}
    named = card.classes != [str(i) for i in range(len(card.classes))]
    about = {"label_names": card.classes} if named else {}
    with atomic_path(config) as partial:
        save_config_for_hf(model, str(partial), model_config=about, model_args=args, data_config=data)
    with atomic(readme) as file:
        file.write(_model_card(card, folder.resolve().name, licence).encode())
    return [weights, config, readme]


def _model_card(card: ModelCard, title: str, licence: str | None) -> str:
    """The README in Markdown, with the facts that the Hub reads in front."""
    own = zoo.is_model(card.model)
    entry = zoo.find(card.model) if own else None
    cfg = None if own else timm.get_pretrained_cfg(card.model)
    published = not card.trained  # else the weights are the user's, and so is their licence
    of_published = entry.licence if entry else getattr(cfg, "license", None)
    licence = licence or (published and of_published) or "none"
    facts = [
        f"- Model: `{card.model}`, input {' x '.join(map(str, card.preprocess.size))}, {len(card.classes)} classes",
        f"- Licence of the weights: {'not stated' if licence == 'none' else licence}",
    ]
    facts += [f"- Paper: {entry.paper}"] if entry else []
    if entry and published:
        facts += [f"- Weights: {entry.address or 'not published'}"]
        facts += [f"- {name} as published: {value:g}" for name, value in entry.metrics.items()]
    facts += [f"- {name} after training: {value:g}" for name, value in card.trained.items()
              if isinstance(value, (int, float))]  # fmt: skip
    head = ["---", f"license: {_LICENCES.get(licence, licence.lower())}", "library_name: timm",
            "pipeline_tag: image-classification", "tags:", "- timm", *["- linescan"] * own, "---"]  # fmt: skip
    use = ["import linescan, timm" if own else "import timm",
           f'model = timm.create_model("local-dir:{title}", pretrained=True)']  # fmt: skip
    return "\n".join([*head, f"# {title}", "", *facts, "", "```python", *use, "```", ""])
