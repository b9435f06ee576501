"""Two small MambaIRv2 learn to denoise and to enlarge photographs, and are measured on others, beside plain filters.

OUT/photos/{train,val}/       photographs that scikit-image and scikit-learn ship
OUT/{denoise,enlarge}/        the two trainings
OUT/restoration.png           details of the photographs of val/: degraded, by the best filter, by the network
"""

from itertools import product
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...engine.atomic import atomic
from ...engine.cards import restore
from ...engine.pairs import Pairs, find_pairs
from ...engine.progress import progress_bar, say
from ...media.degrade import Degradation
from ...media.look import PAPER
from ...media.quality import luma, psnr, to_8_bits
from ...media.resize import enlarge_bicubic
from ...tasks.recipes import RestorationRecipe
from ...tasks.restore import whole
from ..trainings import train_all

__all__ = ["Job", "commands", "run"]

TRAIN = "coffee", "motorcycle_left", "rocket", "camera", "grass", "flower.jpg"
HELD_OUT = "astronaut", "chelsea", "china.jpg"
NOISE = 15

SMALL = {
    "light": True, "embed_dim": 32, "depths": (1, 1, 1), "num_heads": 2, "window_size": 8, "d_state": 8,
    "mlp_ratio": 1.0, "num_tokens": 16, "inner_rank": 16, "img_range": 8.0,
}  # fmt: skip
"""A network that is fast. `img_range` makes its first answers small beside the image, to which they are added: with 1,
a tenth of the training goes by until they are."""

Filter = Callable[[np.ndarray], np.ndarray]


class Job(NamedTuple):
    """What one network is to learn.

    Attributes:
        title: of it, for people.
        recipe: of its training, without the data.
        filters: name -> a filter of degraded images (H, W, 3) in 0..1; several settings of one count as one, by the
            best of them on the held-out photographs.
        on_luma: whether PSNR is of the luma without a border of `scale` pixels.
    """

    title: str
    recipe: dict
    scale: int
    filters: dict[str, list[Filter]]
    on_luma: bool


def jobs() -> dict[str, Job]:
    """By name."""
    from scipy.ndimage import median_filter
    from skimage.restoration import denoise_bilateral, denoise_nl_means

    sigma = NOISE / 255
    common = {"patch": 40, "batch": 4, "lr": 3e-3, "warmup": 20, "ema": 0.99, "repeats": 100, "min_lr": 2e-5}
    return {
        "denoise": Job(
            f"Gaussian noise of sigma {NOISE}",
            {"model": "mambair_v2_color_dn", "model_args": SMALL, "degrade": f"noise {NOISE}", "steps": 600,
             "loss": "charbonnier", **common},
            1,
            {
                "median": [lambda x, n=n: median_filter(x, (n, n, 1), mode="mirror") for n in (3, 5)],
                "bilateral": [
                    lambda x, c=c, s=s: denoise_bilateral(x.clip(0, 1), 7, c * sigma, s, channel_axis=-1)
                    for c, s in product((0.6, 0.8), (3, 6))
                ],
                "non-local means": [
                    lambda x, h=h: denoise_nl_means(
                        x, 5, 6, h=h * sigma, sigma=sigma, fast_mode=True, channel_axis=-1
                    )
                    for h in (0.5, 0.7, 0.9)
                ],
            },
            on_luma=False,
        ),
        "enlarge": Job(
            "Enlarged by 2",
            {"model": "mambair_v2_light_x2", "model_args": SMALL, "steps": 600, **common},
            2,
            {"bicubic": [lambda x: as_array(enlarge_bicubic(as_tensor(x), 2))]},
            on_luma=True,
        ),
    }  # fmt: skip


def as_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) -> (1, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def as_array(images: Tensor) -> np.ndarray:
    """(1, C, H, W) -> (H, W, C)."""
    return images[0].permute(1, 2, 0).numpy()


def write_photographs(folder: Path) -> None:
    """The photographs as PNG files."""
    import sklearn.datasets
    from skimage import data

    for part, names in (("train", TRAIN), ("val", HELD_OUT)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            if name.endswith(".jpg"):
                pixels = sklearn.datasets.load_sample_image(name)
            elif name == "motorcycle_left":
                pixels = data.stereo_motorcycle()[0]
            else:
                pixels = getattr(data, name)()
            pixels = np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels  # some are grey
            with atomic(folder / part / f"{name.removesuffix('.jpg')}.png") as file:
                Image.fromarray(pixels).save(file, "PNG")


def run(out: Path, seed: int = 0) -> dict:
    """Trains and judges both networks; returns, by job, the mean PSNR by what restored the held-out photographs."""
    write_photographs(out / "photos")
    every, scores, details = jobs(), {}, {}
    common = {"data": str(out / "photos"), "seed": seed}
    train_all(
        {
            out / name: RestorationRecipe(evaluate_every=job.recipe["steps"], **common, **job.recipe)
            for name, job in every.items()
        }
    )
    for name, job in every.items():
        scores[name], details[name] = judge(out, name, job)
        _say(job.title, scores[name])
    _draw(out / "restoration.png", scores, details)
    return scores


def judge(out: Path, name: str, job: Job) -> tuple[dict[str, float], list[dict[str, np.ndarray]]]:
    """PSNR by what restored the held-out photographs, and for each of these the images by the same names."""
    high, _ = find_pairs(out / "photos" / "val")
    degrade = Degradation(job.recipe.get("degrade", "bicubic"), job.scale)
    data = Pairs(high, None, 3, job.scale, degrade)
    network, _ = restore(checkpoint=out / name / "model.safetensors")
    tried: dict[str, list[Filter]] = {**job.filters, "MambaIRv2": [lambda x: _network(network, x, job.scale)]}
    pairs = [data[i] for i in range(len(data))]
    images = [{"degraded": as_array(p["low"][None]), "original": as_array(p["high"][None])} for p in pairs]
    scores = {}
    if job.scale == 1:
        scores["degraded"] = float(np.mean([_psnr(i["degraded"], i["original"], job) for i in images]))
    with progress_bar("judging", sum(map(len, tried.values()))) as advance:
        for word, settings in tried.items():
            for setting in settings:
                answers = [setting(one["degraded"]) for one in images]
                score = float(np.mean([_psnr(a, i["original"], job) for a, i in zip(answers, images)]))
                if score > scores.get(word, 0):
                    scores[word] = score
                    for one, answer in zip(images, answers):
                        one[word] = answer
                advance()
    return scores, images


@torch.inference_mode()
def _network(network: torch.nn.Module, image: np.ndarray, scale: int) -> np.ndarray:
    return as_array(whole(network.eval(), as_tensor(image), scale))


def _psnr(image: np.ndarray, original: np.ndarray, job: Job) -> float:
    mine, target = (to_8_bits(as_tensor(x.astype(np.float32))[0]) for x in (image, original))
    return psnr(luma(mine), luma(target), job.scale) if job.on_luma else psnr(mine, target)


def _best_filter(scores: dict[str, float]) -> str:
    return max((word for word in scores if word not in ("MambaIRv2", "degraded")), key=scores.get)


def _say(title: str, scores: dict[str, float]) -> None:
    best = _best_filter(scores)
    listed = ", ".join(f"{word} {value:.2f}" for word, value in scores.items())
    say(f"{title}, PSNR in dB on {len(HELD_OUT)} held-out photographs: {listed}")
    say(("MambaIRv2 is ", ""), (f"{scores['MambaIRv2'] - scores[best]:+.2f} dB", "bold green"), f" beside {best}")


SIDE = 110
"""Pixels of the details that are drawn."""

PLACES = {"astronaut": (55, 170), "chelsea": (95, 120), "china": (180, 250)}
"""Top and left of the detail of each held-out photograph."""


def _draw(path: Path, scores: dict, details: dict) -> None:
    """A row for each job and held-out photograph: degraded, best filter, network, original."""
    from matplotlib.figure import Figure

    rows = [(name, i) for name in details for i in range(len(details[name]))]
    figure = Figure(figsize=(8.8, 2.3 * len(rows)), dpi=110, facecolor=PAPER)
    axes = figure.subplots(len(rows), 4)
    figure.subplots_adjust(0.01, 0.005, 0.99, 0.975, hspace=0.12, wspace=0.03)
    words = sorted(PLACES)
    for line, (name, i) in zip(axes, rows):
        job, images = jobs()[name], details[name][i]
        shown = "degraded", _best_filter(scores[name]), "MambaIRv2", "original"
        for axis, word in zip(line, shown):
            image = images[word]
            top, left = (at * len(image) // len(images["original"]) for at in PLACES[words[i]])
            side = SIDE * len(image) // len(images["original"])
            axis.imshow(image[top : top + side, left : left + side].clip(0, 1), interpolation="nearest")
            axis.set_axis_off()
            score = ""
            if word not in ("original",) and image.shape == images["original"].shape:
                score = f", {_psnr(image, images['original'], job):.2f} dB"
            axis.set_title(f"{job.title if word == 'degraded' and i == 0 else word}{score}", fontsize=8.5, pad=3)
    figure.savefig(path)


def commands(out: Path) -> list[str]:
    """Command lines to try next."""
    photo = out / "photos" / "val" / "chelsea.png"
    return [f"restore {photo} --checkpoint {out / 'enlarge' / 'model.safetensors'} --compare --out {out / 'restored'}"]
