"""`make demo-pixels`: small networks whose answers are images, trained on what pip packages ship, against baselines.

Each part is a module here with `run(out, seed) -> scores`: it writes its files into `out`, and says what it found.
"""

import json
import time
from importlib import import_module
from pathlib import Path
from typing import Sequence

from ...engine.atomic import atomic
from ...engine.progress import say
from ...errors import known
from ..telling import tell_commands, tell_files

__all__ = ["PARTS", "demo_pixels"]

PARTS = {
    "restoration": "noise taken away, images enlarged, and how",
    "anomaly": "what is pasted into textures, found without having seen any",
    "pairs": "digits in two images of a scene, of which neither shows all",
}
"""The parts, in this order, and what the folder of each holds."""


def demo_pixels(out: str | Path = "runs/demo-pixels", seed: int = 0, parts: Sequence[str] = tuple(PARTS)) -> dict:
    """Runs the parts, each in a folder of its name in `out`; returns what `out`/scores.json holds, by part.

    A demo that was there before is replaced.

    Raises:
        InputError: no such part.
    """
    out, started, scores = Path(out), time.monotonic(), {}
    for part in parts:
        module = import_module(f".{known('a part of the demo', part, PARTS)}", __name__)
        scores[part] = module.run(out / part, seed)
    with atomic(out / "scores.json") as file:
        file.write(json.dumps(scores, indent=1).encode())
    say(f"All of it took {time.monotonic() - started:.0f} s.")
    tell_files(out, {f"{part}/": PARTS[part] for part in parts} | {"scores.json": "all scores"})
    tell_commands([line for part in parts for line in import_module(f".{part}", __name__).commands(out / part)])
    return scores
