"""What tools/fuzz.py makes: one module per floor, each with its `KINDS`."""

import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

__all__ = ["TRAP", "Kind", "damage"]

TRAP = "ran"  # the file beside a hostile one that its code would make


@dataclass
class Kind:
    """One kind of file.

    Attributes:
        make: (random numbers, folder) -> a file in the folder.
        use: what a user would do with it.
        errors: the errors that refuse a file.
    """

    make: Callable[[random.Random, Path], Path]
    use: Callable[[Path], None]
    errors: tuple[type[Exception], ...]


def damage(data: bytes, chance: random.Random) -> bytes:
    """One to twenty changes: bytes replaced, cut out, put in, repeated, zeroed; or the end missing."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
        at = chance.randrange(len(data) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 64, 1000))
        match chance.randrange(7):
            case 0 | 1:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = chance.randbytes(size)
            case 4:
                data[at:at] = data[at : at + size]
            case 5:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case 6:
                if chance.random() < 0.3:
                    del data[at:]
                else:  # a number becomes a large one
                    data[at : at + 8] = struct.pack("<Q", chance.choice((2**31, 2**40, 2**63, 2**64 - 1)))
        if not data:
            break
    return bytes(data)
