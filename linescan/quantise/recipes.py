"""What is quantised how: the methods, and the numbers of bits.

- mambaquant: MambaQuant, Xu et al., ICLR 2025, arXiv 2501.13484; github.com/MambaQuant/MambaQuant (without a licence).
- quamba: Quamba, Chiang et al., ICLR 2025, arXiv 2410.13229; github.com/enyac-group/Quamba (UT Austin Research Licence,
  not for commercial use). Of language models; here its algorithm for images, with two directions.
- dynamic: int8 linear layers with a scale for each token, without calibration; all else stays as it is.
- naive: the plain grids of MambaQuant's quantiser with one min-max scale for each tensor: what the others are compared
  with.

Written from the papers.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, known

__all__ = ["METHODS", "TRANSFORMS", "Method", "Recipe"]

TRANSFORMS = ("R1", "R2", "R3", "R4", "R5", "R6", "S1", "S2", "S3", "S4", "S5", "S7", "klt", "mean")
"""Names of transforms that leave the function of a model as it is; see `transforms`."""


@dataclass(frozen=True)
class Method:
    """A way to quantise.

    Attributes:
        about: one line.
        transforms: of `TRANSFORMS`, made before anything is rounded.
        scans: "states" (both factors of the states' product with C, and the inputs of every projection), "inputs" (what
            the scan reads), or None: only linear layers are quantised.
        symmetric: whether zero stands for zero.
        by_row: a scale for each row of a weight, rather than for the weight.
        group: of numbers that share a scale in a Linear's weight of 4 bits.
        scales: of activations, see `Quantiser`.
        observer: of static scales.
        scan_observer: of what is scanned.
        products: the scales of the states and of C.
        apart: class tokens have a scale of their own before out_proj.
        smallest: of scales.
    """

    about: str
    transforms: tuple[str, ...] = ()
    scans: str | None = "states"
    symmetric: bool = False
    by_row: bool = True
    group: int = 0
    scales: str = "static"
    observer: str = "minmax"
    scan_observer: str = "minmax"
    products: str = "static"
    apart: bool = False
    smallest: float = 1e-5


METHODS: dict[str, Method] = {
    "mambaquant": Method(
        "rotations of equal variance (KLT, Hadamard), smoothing, percentile scales; states per token",
        transforms=("R1", "R2", "R4", "R5", "S2", "S3", "klt", "mean"),
        observer="percentile",
        scan_observer="percentile",
        products="token",
        apart=True,
    ),
    "quamba": Method(
        "a percentile for what is scanned, Hadamard rotations of the stream and of the scan's output",
        transforms=("R1", "R2"),
        scans="inputs",
        symmetric=True,
        by_row=False,
        group=128,
        scan_observer="moving",
        smallest=1e-6,
    ),
    "dynamic": Method(
        "int8 linear layers with a scale for each token; no calibration", scans=None, symmetric=True, scales="token"
    ),
    "naive": Method("one min-max scale for each tensor; to compare with", by_row=False),
}


@dataclass(frozen=True)
class Recipe:
    """A method at some number of bits.

    Args:
        method: a key of `METHODS`.
        bits: of weights and activations, as "w8a8" or "w4a8"; 2 to 8 each.
        changes: attributes of the method, changed.

    Raises:
        InputError: no such method, bits or transforms.
    """

    method: str = "mambaquant"
    bits: str = "w8a8"
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        known("the method", self.method, tuple(METHODS))
        if not isinstance(self.bits, str) or not re.fullmatch("w[2-8]a[2-8]", self.bits):
            raise InputError(
                f"bits are those of weights and activations, 2 to 8 each, as in w8a8 or w4a8, not {self.bits!r}"
            )
        for name in self.plan.transforms:
            known("a transform", name, TRANSFORMS)

    @property
    def plan(self) -> Method:
        """The method with its changes."""
        return Method(**{**vars(METHODS[self.method]), **self.changes})

    @property
    def weight_bits(self) -> int:
        """Of weights."""
        return int(self.bits[1])

    @property
    def act_bits(self) -> int:
        """Of activations."""
        return int(self.bits[3])

    @property
    def calibrated(self) -> bool:
        """Whether images are needed."""
        return self.plan.scales == "static" or bool(self.plan.transforms)
