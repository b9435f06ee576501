"""The table of docs/deploy.md: what each family's export to each format gives, how exact it is, and how fast.

    python tools/deploy.py --out docs/deploy.md             # exports every family as every format: ten minutes or so
    python tools/deploy.py --out docs/deploy.md --threads 1 --time   # and times all that works; on a quiet machine

A model of each family has random weights: only its numbers count. The first run of a size is not counted; a time is the
least of five.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import linescan
from linescan.engine.atomic import atomic
from linescan.engine.cards import ModelCard, preprocess_of
from linescan.engine.packages import FORMATS, export_package, open_package
from linescan.errors import InputError

MODELS = (
    "vim_tiny_patch16_224", "vmamba_tiny_s1l8", "local_vim_tiny", "local_vssm_tiny", "vig_tiny", "vig_h_tiny",
    "vrwkv_tiny", "vrwkv6_tiny", "mambavision_tiny", "mamband_small_patch16_224", "videomamba_tiny_patch16_224",
    "rsmamba_base", "rwkvsam_tiny", "segman_tiny", "van_b0", "care_s0", "inline_deit_tiny", "inline_swin_tiny",
    "scan_tiny", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
)  # fmt: skip
BEGIN, END = "<!-- tools/deploy.py writes from here -->", "<!-- to here -->"


def least(call) -> float:
    """Milliseconds of a call."""
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def cells(name: str, timed: bool) -> list[str]:
    """What eager torch and each format give for a model."""
    torch.manual_seed(0)
    model = linescan.create_model(name).eval() if linescan.zoo.is_model(name) else _of_timm(name)
    card = ModelCard(name, {}, [str(i) for i in range(model.num_classes)], preprocess_of(model))
    images = torch.randn(1, *card.preprocess.size)
    with torch.no_grad():
        row = [f"{least(lambda: model(images)):.0f} ms" if timed else "works"]
        for format, suffix in FORMATS.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"model{suffix}"
                try:
                    error = export_package(model, card, path, format)
                except InputError as refusal:
                    print(f"  {format}: {refusal}", flush=True)
                    row.append("no")
                    continue
                run, _ = open_package(path, trust=True)
                row.append(f"{error:.0e}" + (f", {least(lambda: run(images)):.0f} ms" if timed else ""))
    return row


def _of_timm(name: str) -> torch.nn.Module:
    import timm

    return timm.create_model(name).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the page that holds the table")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [f"| model | eager torch | {' | '.join(FORMATS)} |", "| --- | --- |" + " --- |" * len(FORMATS)]
    for name in args.models:
        print(name, flush=True)
        lines.append(f"| `{name}` | {' | '.join(cells(name, args.time))} |")
    before, _, rest = args.out.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    with atomic(args.out) as file:
        file.write("\n".join([before + BEGIN, "", *lines, "", END + after]).encode())


if __name__ == "__main__":
    main()
