"""Segmentors and detectors of OpenMMLab configs, as the tools see them.

Images stay in OpenCV's order (blue, green, red) from `encode` on, as OpenMMLab's pipelines and preprocessors expect.

Checkpoints are read without unpickling anything but weights and plain data.
"""

import io
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from ..checkpoint import fit, read_meta, read_state_dict, readable
from ..errors import InputError
from ..tasks.open import register_opener
from ..tasks.results import Found, dataset_names, names_and_colours
from .keys import translate_keys

# What OpenMMLab's test pipelines do to read an image and to pack it; what stands between is kept.
_READS = ("LoadImage", "LoadExtraImage", "LoadAnnotations", "LoadProposals")
_PACKS = "Pack"


class _OpenMMLab:
    """A model of mmseg or mmdet, built as its config says, with the weights of a checkpoint and its test pipeline."""

    package: str

    def __init__(self, config: str | Path, checkpoint: str | Path | None):
        with _quiet():
            self._open(config, checkpoint)

    def _open(self, config: str | Path, checkpoint: str | Path | None):
        cfg = _read_config(config, self.package)
        scope = cfg.get("default_scope") or self.package
        if scope != self.package or "model" not in cfg:
            verb = {"mmseg": "segment", "mmdet": "detect"}
            other = f"; `linescan {verb[scope]}` reads it" if scope in verb and scope != self.package else ""
            raise InputError(f"{config} is not a config of {self.package}{other}")
        checkpoint = checkpoint or cfg.get("load_from")
        if checkpoint is None:
            raise InputError(f"{config} says how the model is built; give a checkpoint with its weights as well")
        state, meta = read_state_dict(checkpoint), read_meta(checkpoint)

        from mmcv.transforms import Compose
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import MODELS, DefaultScope

        if "data_preprocessor" in cfg:
            cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
        with DefaultScope.overwrite_default_scope(self.package):
            try:  # building does not initialise: nothing is fetched
                self.module: nn.Module = revert_sync_batchnorm(MODELS.build(cfg.model))
            except Exception as error:  # registries pass on whatever the modules raise
                said = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"the model of {config} cannot be built: {said}") from error
            _load(self.module, state, checkpoint)
            extra = [step for step in _test_pipeline(cfg) if step["type"] == "LoadExtraImage"]
            self.images = 1 + len(extra)
            self.grey_extra = all(step.get("color_type", "grayscale") == "grayscale" for step in extra)
            steps = [step for step in _test_pipeline(cfg) if not step["type"].startswith(_READS)]
            self.pipeline = Compose([step for step in steps if not step["type"].startswith(_PACKS)])
            self.resizes = len(self.pipeline.transforms) > 0
            self.pack = Compose([step for step in steps if step["type"].startswith(_PACKS)])
        self.meta = _dataset_meta(cfg, self.package) | dataset_names(meta)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images (..., H, W, 3) of bytes, RGB -> in OpenCV's order; several of a scene, one behind the other, each."""
        parts = images.reshape(*images.shape[:-1], -1, 3)
        return parts[..., ::-1].reshape(images.shape)

    def run_pipeline(self, image: np.ndarray) -> dict:
        """What the test pipeline makes of an image (H, W, 3) of bytes, RGB, up to where it would pack it."""
        image = np.ascontiguousarray(self.encode(image))
        shape = image.shape[:2]
        results = {"img": image, "img_shape": shape, "ori_shape": shape, "img_id": 0, "img_path": None}
        return self.pipeline(results)


class MMSegmentor(_OpenMMLab):
    """A segmentor of mmseg.

    Attributes:
        images: that it reads of each scene.
        grey_extra: whether all but the first are read as grey.
        window, stride: (height, width) if the config's test mode is "slide", else None.
        resizes: whether the test pipeline changes images at all.
        align_corners: how logits are enlarged to the image.
        channels: of the logits.
    """

    package = "mmseg"

    def __init__(self, config: str | Path, checkpoint: str | Path | None):
        super().__init__(config, checkpoint)
        if not hasattr(self.module, "encode_decode"):
            raise InputError(f"{config}: {type(self.module).__name__} is no segmentor that linescan can run")
        test = self.module.test_cfg or {}
        slide = test.get("mode") == "slide"
        self.window, self.stride = (tuple(test[k]) if slide else None for k in ("crop_size", "stride"))
        self.align_corners = self.module.align_corners
        self.channels = self.module.out_channels
        self.classes, self.palette = names_and_colours(self.meta, self.module.num_classes)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """An image (H, W, 3 * images) of bytes, RGB -> as the config's test pipeline gives it to the model."""
        return self.run_pipeline(image)["img"]

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3 * images, H, W) of bytes, encoded -> logits (B, C, H, W).

        C is 1 for two classes told by a threshold.
        """
        from mmseg.structures import SegDataSample

        height, width = images.shape[-2:]
        shape = {"img_shape": (height, width), "ori_shape": (height, width)}
        samples = [SegDataSample(metainfo=shape) for _ in images]
        data = self.module.data_preprocessor({"inputs": list(images), "data_samples": samples}, False)
        metas = [sample.metainfo for sample in data["data_samples"]]
        logits = self.module.encode_decode(data["inputs"], metas)
        left, _, top, _ = metas[0].get("img_padding_size", (0, 0, 0, 0))
        return logits[..., top : top + height, left : left + width]

    def decide(self, logits: Tensor) -> Tensor:
        """Logits (C, H, W) -> classes (H, W)."""
        if len(logits) > 1:
            return logits.max(0).indices  # in a third of the time of `argmax`, on CPUs
        return (logits[0].sigmoid() > self.module.decode_head.threshold).long()


class MMDetector(_OpenMMLab):
    """A detector of mmdet."""

    package = "mmdet"

    def __init__(self, config: str | Path, checkpoint: str | Path | None):
        super().__init__(config, checkpoint)
        heads = {m.num_classes for m in self.module.modules() if isinstance(getattr(m, "num_classes", None), int)}
        known = len(self.meta.get("classes", ()))  # the head of the proposals, for one, knows a single class
        self.classes, self.palette = names_and_colours(
            self.meta, known if known in heads else max(heads, default=known)
        )

    def detect(self, images: Sequence[np.ndarray]) -> list[Found]:
        """Images (H, W, 3) of bytes, RGB -> the instances of each, in its pixels."""
        packed = [self.pack(self.run_pipeline(image)) for image in images]
        batch = {key: [p[key] for p in packed] for key in ("inputs", "data_samples")}
        found = []
        for sample in self.module.test_step(batch):
            instances = sample.pred_instances
            masks = instances.get("masks")
            boxes = getattr(instances.bboxes, "tensor", instances.bboxes)
            found.append(Found(boxes.float(), instances.scores.float(), instances.labels, masks))
        return found


register_opener("segmentation", MMSegmentor)
register_opener("detection", MMDetector)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the packages print and warn of while they are imported and build a model for training."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _read_config(config: str | Path, package: str):
    from importlib.util import find_spec

    from .runner import read_config

    for needed in ("mmengine", "mmcv", package):
        if find_spec(needed) is None:
            raise InputError(
                f"{config}: configs of {package} need the OpenMMLab packages ({needed} is missing); "
                "tools/install_openmmlab.py installs them"
            )
    if package == "mmseg":
        import linescan.openmmlab.segman  # noqa: F401  (they register their parts)
        import linescan.openmmlab.sigma  # noqa: F401
    prefix, _, inside = str(config).rpartition("::")
    if prefix:  # "mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512": as MMEngine names a package's own
        import linescan.openmmlab  # noqa: F401  (its bases are found in the forks, too)

        spec = find_spec(prefix) if prefix.isidentifier() else None
        config = Path(spec.origin if spec else prefix).parent / ".mim" / "configs" / f"{inside.removesuffix('.py')}.py"
    return read_config(config)


def _load(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Strictly, but for what only a training needs: auxiliary heads; and the preprocessor's constants."""
    optional = ("auxiliary_head.", "data_preprocessor.")
    state = {key: value for key, value in state.items() if not key.startswith(optional)}
    for name, part in module.named_modules():
        if hasattr(part, "checkpoint_filter"):
            with readable(path, type(part).__name__):
                translate_keys(part, state, f"{name}.")
    fit(module, state, path, optional=lambda key: key.startswith(optional))


def _test_dataset(cfg) -> dict:
    dataset = cfg.get("test_dataloader", {}).get("dataset", {})
    while "dataset" in dataset:  # of a wrapper
        dataset = dataset["dataset"]
    return dataset


def _test_pipeline(cfg) -> list[dict]:
    return list(_test_dataset(cfg).get("pipeline") or cfg.get("test_pipeline") or [])


def _dataset_meta(cfg, package: str) -> dict:
    """What the config says of its classes: the dataset's `metainfo`, or what its type knows."""
    from importlib import import_module

    dataset = _test_dataset(cfg)
    known = {}
    if dataset.get("type"):
        import_module(f"{package}.datasets")
        found = import_module(f"{package}.registry").DATASETS.get(dataset["type"])
        known = dataset_names({"dataset_meta": getattr(found, "METAINFO", None)})
    given = dataset.get("metainfo") or {}
    own = dataset_names({"dataset_meta": dict(given)})
    if own.get("classes") and own["classes"] != known.get("classes"):
        known = {}  # the colours of other classes
    return known | own
