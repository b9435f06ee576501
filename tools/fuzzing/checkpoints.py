"""Damaged and hostile checkpoints, and model cards."""

import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Callable

import safetensors.torch
import timm
import torch

import linescan
from linescan.engine.cards import ModelCard, preprocess_of, read_card, restore
from linescan.errors import CheckpointError, InputError
from linescan.notices import show_notices_with

from . import TRAP, Kind, damage

show_notices_with(lambda line, loud: None)

# -- checkpoints ------------------------------------------------------------------------------------------------------

SMALL = dict(img_size=32, patch_size=16, embed_dim=16, depth=2, num_classes=3)


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vim_tiny_patch16_224", **SMALL)


def small_card(model: torch.nn.Module) -> ModelCard:
    classes, preprocess = ["cat", "dog", "cow"], preprocess_of(model, 3, 32)
    return ModelCard("vim_tiny_patch16_224", dict(SMALL), classes, preprocess, {"epoch": 3, "val_top1": 70.5})


def zipped(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def legacy(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def safe(content: dict, card: object = None) -> bytes:
    text = card if isinstance(card, str) else json.dumps(card)
    return safetensors.torch.save(content, metadata=None if card is None else {"linescan": text})


def bases() -> dict[str, bytes]:
    """Whole files of every format, as training programs leave them."""
    model = small_model()
    state = model.state_dict()
    training = {
        "model": state, "model_ema": state, "epoch": 7, "args": Namespace(lr=1e-3),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}},
    }  # fmt: skip
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "meta": {"CLASSES": ("a", "b")}}
    return {
        "flat.pth": zipped(state),
        "training.pth": zipped(training),
        "wrapped.pth": zipped(wrapped),
        "legacy.pth": legacy(training),
        "half.pth": zipped({key: value.half() for key, value in state.items()}),
        "own.safetensors": safe(state, small_card(model).as_dict()),
        "bare.safetensors": safe(state),
    }


def repack(data: bytes, chance: random.Random) -> bytes:
    """A zip file whose records are damaged and whose directory and checksums are right, or the other way round."""
    source, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    method = zipfile.ZIP_DEFLATED if chance.random() < 0.1 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as target:
        warnings.simplefilter("ignore")  # of names that are there twice
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl") and chance.random() < 0.8 or chance.random() < 0.05:
                content = damage(content, chance)
            for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 1, 1, 1, 2))):
                target.writestr(info.filename, content)
    return file.getvalue()


class Evil:
    """Pickles to a call."""

    def __init__(self, function: Callable, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(chance: random.Random, folder: Path) -> object:
    """Content of a pickle that no training program leaves, or that would run code."""
    state, trap = small_model().state_dict(), folder / TRAP
    key = chance.choice(list(state))
    loop: dict = {"epoch": 1}
    loop["model"] = loop["state_dict"] = loop
    deep: object = state
    for _ in range(chance.choice((3, 2000))):
        deep = {"model": deep}
    big = chance.choice((2**20, 2**30, 2**40))
    return chance.choice((
        loop,
        [loop, loop],
        {"model": {"state_dict": loop}},
        deep,
        {i: value for i, value in enumerate(state.values())},
        {"model": {**state, 3: torch.zeros(2)}},
        {**state, key: state[key].reshape(-1)[:1].to_sparse()},
        {**state, key: torch.quantize_per_tensor(state[key].float(), 0.1, 0, torch.qint8)},
        {**state, key: state[key].to("meta")},
        {**state, key: torch.zeros(1).expand(big)},
        {**state, key: state[key].to(torch.int8)},
        {**state, key: state[key].to(torch.complex64)},
        {**state, key: state[key] * float("nan")},
        {**state, key: torch.zeros(0)},
        {**state, key: "text"},
        {**state, "x" * chance.choice((10, 100_000)) + "\n[red]\x1b[2J": torch.zeros(2)},
        {"model": {}}, {"model": None}, {"model": [1, 2]}, {}, [], None, 3, "model", state[key],
        {"epoch": 3, "optimizer": {"state": {}}},
        {"model": state, "extra": Evil(os.system, f"touch {trap}")},
        {"model": state, "extra": Evil(eval, f"open({str(trap)!r}, 'w')")},
        {"model": state, "extra": Evil(getattr, "text", "join")},
        {"model": state, "extra": Evil(set, tuple(range(chance.choice((3, 100_000)))))},
        {"model": state, "extra": small_model()},
        {"model": state, "extra": {1, 2, frozenset((3,))}, "when": 2**5000},
    ))  # fmt: skip


def crafted_pickle(chance: random.Random) -> bytes:
    """A pickle of few opcodes that ask for much."""
    size = chance.choice((2**24, 2**31 - 1))
    many_calls = b"(" + b"K\x01" * 20_000 + b"e0" + b"h\x00h\x01\x85R0" * 20_000 + b"."
    return chance.choice((
        b"\x80\x02]r" + struct.pack("<I", size) + b".",  # a memo of that many entries
        b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of that many bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x02\x8b" + struct.pack("<i", size) + b".",
        b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02]q\x00" + b"h\x00" * 100_000 + b"e.",
        b"\x80\x02ccollections\nOrderedDict\nq\x00]q\x01" + many_calls,
        b"\x80\x02cbuiltins\nset\nq\x00]q\x01" + many_calls,
        b"\x80\x02cargparse\nNamespace\nq\x00]q\x01" + many_calls,
        b"\x80\x02\x82\x01.", b"\x80\x02i__builtin__\neval\n.", b"cos\nsystem\n(S'true'\ntR.", b"\x80\xff.", b".", b"",
    ))  # fmt: skip


def in_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("archive/data.pkl", content)
        target.writestr("archive/byteorder", "little")
        target.writestr("archive/data/0", bytes(256))
    return file.getvalue()


def odd_file(chance: random.Random, path: Path) -> None:
    """Not a checkpoint at all, or one whose sizes are not what they say."""
    match chance.randrange(9):
        case 0:
            path.write_bytes(b"")
        case 1:
            path.write_bytes(b"<!DOCTYPE html><html>404</html>")
        case 2:  # a header of 10 GB, in a file of that size that takes no room
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", 10 * 2**30) + b'{"a":')
                file.truncate(11 * 2**30)
        case 3:
            path.write_bytes(struct.pack("<Q", 2**63) + b'{"a":1}' + bytes(64))
        case 4:
            header = json.dumps(
                {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
            )
            path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
        case 5:
            header = b'{"a":{"dtype":"F32","shape":[1000000,1000000,1000000],"data_offsets":[0,4]}}'
            path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        case 6:
            path.write_bytes(struct.pack("<Q", 100_000) + b"{" * 100_000 + bytes(8))
        case 7:
            path.mkdir()
        case 8:
            os.mkfifo(path)


def make_checkpoint(chance: random.Random, folder: Path) -> Path:
    name, data = chance.choice(list(BASES.items()))
    path = folder / name
    way = chance.random()
    if way < 0.4:
        path.write_bytes(damage(data, chance))
    elif way < 0.6 and name.endswith(".pth") and name != "legacy.pth":
        path.write_bytes(repack(data, chance))
    elif way < 0.65:
        other = chance.choice(list(BASES.values()))
        path.write_bytes(data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :])
    elif way < 0.85:
        write = chance.choice((zipped, legacy, pickle.dumps))
        content = hostile(chance, folder)
        try:
            path.write_bytes(write(content))
        except Exception:  # not every writer can write everything
            path.write_bytes(damage(data, chance))
    elif way < 0.93:
        content = crafted_pickle(chance)
        path.write_bytes(chance.choice((content, in_zip(content))))
    else:
        odd_file(chance, path)
    return path


def use_checkpoint(path: Path) -> None:
    linescan.read_state_dict(path)
    model = small_model()
    linescan.load_checkpoint(model, path, adapt=True)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


# -- cards ------------------------------------------------------------------------------------------------------------

STRANGE = (
    None, [], {}, 0, -1, 1, 3.5, 5, True, "", "x", "\n[red]", [1], [[1]], {"a": 1}, float("nan"), float("inf"), 1e300,
    2**31, 2**70, -(2**70), [0, 0], [1, 2, 3], "../../etc/passwd", "hf-hub:owner/name", "local-dir:/etc", "x" * 100_000,
    list(range(5000)), "resnet18", "vim_small_patch16_224", 10**6, 131_072, "none",
)  # fmt: skip


def make_card(chance: random.Random, folder: Path) -> Path:
    """The card of a whole file with some of its values replaced, removed or added, or its text damaged."""
    model = small_model()
    card = json.loads(json.dumps(small_card(model).as_dict()))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = card
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.7:
                place = place[key]
                continue
            match chance.randrange(8):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    word = chance.choice(("pretrained", "checkpoint_path", "device", "depth", "colour", "num_classes"))
                    place[word] = chance.choice(STRANGE)
                case _:
                    place[key] = chance.choice(STRANGE)
            break
    text = json.dumps(card)
    if chance.random() < 0.15:
        text = chance.choice(("[]", "null", "3", '"x"', "{", "[" * 100_000, "NaN", "1" * 10_000, text[:-20]))
    elif chance.random() < 0.15:
        text = damage(text.encode(), chance).decode(errors="replace")
    path = folder / "card.safetensors"
    path.write_bytes(safe(model.state_dict(), text))
    return path


def use_card(path: Path) -> None:
    read_card(path)
    model, card = restore(checkpoint=path)
    model.eval()
    if card.preprocess.size[1] <= 256 >= card.preprocess.size[2]:
        with torch.no_grad():
            try:
                model(torch.zeros(1, *card.preprocess.size))
            except InputError:  # a size that the model cannot read
                pass


BASES = bases()
KINDS = {
    "checkpoints": Kind(make_checkpoint, use_checkpoint, (CheckpointError,)),
    "cards": Kind(make_card, use_card, (CheckpointError,)),
}
