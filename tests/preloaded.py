"""What no process of runs.py has to import: they are forked from one that has imported this."""

import gc
from contextlib import suppress
from importlib import import_module

for name in (
    "tests.runs", "linescan.cli", "linescan.heads", "linescan.engine.training", "linescan.tasks.pretrain",
    "linescan.media.clouds", "sklearn.datasets", "torch.utils.tensorboard", "torch._dynamo", "pydantic.networks", "av",
):  # fmt: skip
    import_module(name)
for name in ("linescan.openmmlab.runner", "linescan.openmmlab.sigma", "linescan.openmmlab.yolo"):
    with suppress(ImportError):
        import_module(name)

# Nothing of it is garbage, and a collection that looked through it would copy it in every process.
gc.collect()
gc.freeze()
