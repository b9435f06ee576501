"""Training from OpenMMLab configs, with MMEngine's Runner."""

import os
import time
from pathlib import Path
from typing import Sequence

from ..engine.configs import find_config
from ..errors import InputError

__all__ = ["parse_options", "read_config", "train_config"]


def parse_options(pairs: Sequence[str]) -> dict:
    """`["train_cfg.max_iters=10", "model.backbone.depths=[1,1,1,1]"]` as keys and values, read as MMEngine reads them.

    Raises:
        InputError: one of them is not KEY=VALUE.
    """
    from mmengine.config import DictAction

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InputError(f"--cfg-options takes KEY=VALUE, not {pair!r}")
        options[key] = DictAction._parse_iterable(value)
    return options


def read_config(name: str | Path, options: Sequence[str] = ()):
    """The `mmengine.Config` of a file or of one of linescan's configs, with options of the command line over it.

    Raises:
        InputError: the OpenMMLab packages are missing, there is no such config, or it cannot be read.
    """
    try:
        from mmengine.config import Config, ConfigDict  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"configs need the OpenMMLab packages ({error}); tools/install_openmmlab.py installs them")
    path = find_config(name)
    try:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(parse_options(options))
    except InputError:
        raise
    except Exception as error:  # a config is a program: it may raise anything at all
        raise InputError(f"cannot read {path}: {str(error).strip() or type(error).__name__}") from error
    return cfg


def train_config(
    name: str | Path, work_dir: str | Path | None = None, resume: bool = False, options: Sequence[str] = ()
) -> Path:
    """Trains as a config says; under torchrun, with one process a GPU, or on CPUs where there is none.

    Args:
        name: a file, or the name of one of linescan's configs (`linescan.openmmlab.list_configs`).
        work_dir: for logs and checkpoints; by default the config's own, or runs/NAME.
        resume: go on from the last checkpoint there, if there is one.
        options: `KEY=VALUE` over the config's values.

    Returns:
        The folder of logs and checkpoints.

    Raises:
        InputError: see `read_config`.
    """
    cfg = read_config(name, options)
    from mmengine.runner import Runner

    from .resumable import refuse_pickles

    cfg.work_dir = str(work_dir or cfg.get("work_dir") or Path("runs") / Path(name).stem)
    cfg.resume = resume or cfg.get("resume", False)
    if "visualizer" in cfg:  # MMEngine finds visualisers by name: a second run of a process would log into the first's
        cfg.visualizer.name = f"{cfg.work_dir}-{time.monotonic_ns()}"
    if "LOCAL_RANK" in os.environ:
        cfg.launcher = "pytorch"
        _join_on_cpus(cfg)
    refuse_pickles()  # MMEngine would go on to unpickle what the restricted reading refuses
    Runner.from_cfg(cfg).train()
    return Path(cfg.work_dir)


def _join_on_cpus(cfg) -> None:
    """Where there is no GPU, joins torchrun's processes, which MMEngine does for GPUs alone."""
    import torch

    if not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
        wrapper = {"type": "MMDistributedDataParallel", "device_ids": None}
        cfg.model_wrapper_cfg = wrapper | (cfg.get("model_wrapper_cfg") or {})
        _unsynchronise(cfg.model)


def _unsynchronise(part) -> None:
    """Makes synchronised batch norms plain ones in a part of a config: torch has them on GPUs alone."""
    if isinstance(part, dict):
        if part.get("type") == "SyncBN":
            part["type"] = "BN"
        part = list(part.values())
    for inner in part if isinstance(part, (list, tuple)) else ():
        _unsynchronise(inner)
