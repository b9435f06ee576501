"""Bytes that a compiled kernel asks of global memory, counted by running the integers of its PTX.

Control flow, addresses and masks of the kernels are integers made of arguments, program and thread numbers alone, but
for route tables. So those instructions are run for all threads of a block at once, and all others are left out. What
several threads of a block ask for in one instruction counts once; what a later instruction asks for again counts again,
though a cache may have it.
"""

import re
from typing import Callable, NamedTuple

import numpy as np

WORD = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)")
REGISTER = re.compile(r"%[a-z]+\d+")
ACCESS = re.compile(r"(ld|st)\.(?:\w+\.)*?global(?:\.\w+:?:?\w*)*?(?:\.v(\d))?\.[bufs](\d+)$")
MOST_PROGRAMS = 16  # of a grid, evenly over it

COMPARISONS: dict[str, Callable] = dict(
    eq=np.equal, ne=np.not_equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal,
    lo=np.less, ls=np.less_equal, hi=np.greater, hs=np.greater_equal,
)  # fmt: skip


class Instruction(NamedTuple):
    guard: str  # predicate register, or ""
    negated: bool
    name: str
    operands: list[str]


class Traffic(NamedTuple):
    loaded: float
    stored: float

    def __add__(self, other):
        return Traffic(self.loaded + other.loaded, self.stored + other.stored)


def _quotient(a, b):
    return np.where(b == 0, 0, np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1)))


def _shifted(a, n, bits: int, left: bool):
    n = np.asarray(n) & 0xFFFFFFFF
    moved = np.left_shift(a, np.minimum(n, 63)) if left else np.right_shift(a, np.minimum(n, 63))
    return np.where(n >= bits, 0 if left else np.right_shift(a, 63), moved)


ARITHMETIC: dict[str, Callable] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.wide": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "div": _quotient,
    "rem": lambda a, b: a - b * _quotient(a, b),
    "bfe": lambda a, start, length: (a >> start) & ((1 << length) - 1),
}


class Program:
    """A kernel's PTX, as the instructions that decide what memory it asks for."""

    def __init__(self, ptx: str):
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        for line in ptx[ptx.index("\n{") + 2 :].splitlines():
            line = line.split("//")[0].strip().rstrip(";")
            if re.match(r"\$\w+:$", line):
                self.labels[line[:-1]] = len(self.instructions)
            elif line and line[0] not in ".{}#)":
                guard, negated = "", False
                if line[0] == "@":
                    guard, line = line.split(None, 1)
                    negated, guard = guard[1] == "!", guard.lstrip("@!")
                name, _, rest = line.partition(" ")
                self.instructions.append(Instruction(guard, negated, name, WORD.findall(rest.replace("\t", " "))))
        self.threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)[1])
        self._find_unknown()

    def _find_unknown(self) -> None:
        """The registers that hold data, or something made of it; in the end `unknown` has them all."""
        self.unknown: set[str] = set()
        while True:
            before = len(self.unknown)
            for i in self.instructions:
                if i.name.startswith(("st.", "bra", "ret", "cp.async", "bar.")) or not i.operands:
                    continue
                sources = REGISTER.findall(" ".join([*i.operands[1:], i.guard]))
                if self._rule(i) is None or self.unknown.intersection(sources):
                    self.unknown.update(REGISTER.findall(i.operands[0]))
            if len(self.unknown) == before:
                break

    def _rule(self, i: Instruction) -> Callable | None:
        """What an integer instruction computes, or None."""
        name, *types = i.name.split(".")
        if name == "ld":
            return (lambda a: a) if types[0] == "param" and types[-1][0] != "f" else None
        if not types or types[-1] not in ("b32", "u32", "s32", "b64", "u64", "s64", "b16", "u16", "s16", "pred"):
            return None
        if "{" in "".join(i.operands) or (name == "cvt" and types[-2][0] == "f"):
            return None
        bits = 1 if types[-1] == "pred" else int(types[-1][1:])
        unsigned = types[-1][0] == "u" or name == "setp" and types[0] in ("lo", "ls", "hi", "hs")
        if name == "setp":
            if types[0] not in COMPARISONS or len(types) != 2:
                return None
            rule = COMPARISONS[types[0]]
        elif name == "selp":
            return lambda a, b, p: np.where(p, a, b)
        elif name in ("shl", "shr"):
            unsigned = unsigned and name == "shr"

            def rule(a, n):
                return _shifted(a, n, bits, name == "shl")
        elif name == "shfl" and types[1] == "idx" and i.operands[2] == "0":
            return lambda a, *_: np.repeat(np.broadcast_to(a, self.threads)[::32], 32)
        else:
            rule = ARITHMETIC.get(".".join((name, *types[:-1])) if types[0] in ("lo", "wide") else name)
        if rule is None or not unsigned or bits == 64:
            return rule
        return lambda *args: rule(*(np.asarray(a) & ((1 << bits) - 1) for a in args))

    def run(self, parameters: list[int], program: tuple[int, int, int], grid: tuple[int, int, int]) -> Traffic:
        """What one program asks for."""
        loaded = stored = at = 0
        special = {f"%{kind}.{axis}": values[n] for kind, values in (("ctaid", program), ("nctaid", grid))
                   for n, axis in enumerate("xyz")}  # fmt: skip
        special |= {"%tid.x": np.arange(self.threads, dtype=np.int64)}
        values: dict = {}

        def value(operand: str):
            if operand[0] == "%":
                return special[operand] if operand in special else values[operand]
            if operand[0] == "[":
                return np.int64(parameters[int(operand[1:-1].rpartition("_")[2])])
            return np.int64(int(operand, 0) if NUMBER.fullmatch(operand) else 0)

        def active(i: Instruction):
            mask = np.ones(self.threads, bool)
            if i.guard and i.guard not in self.unknown:
                mask &= np.broadcast_to(np.asarray(values[i.guard], bool) ^ i.negated, mask.shape)
            return mask

        def asked(operand: str, mask, width: int) -> int:
            register, _, offset = operand.strip("[] ").partition("+")
            register = register.strip()
            if register in self.unknown:
                return int(mask.sum()) * width
            return len(np.unique(np.broadcast_to(values[register], mask.shape)[mask])) * width

        while at < len(self.instructions):
            i, at = self.instructions[at], at + 1
            access = ACCESS.match(i.name)
            if access:
                kind, vector, bits = access[1], int(access[2] or 1), int(access[3])
                count = asked(i.operands[0 if kind == "st" else 1], active(i), vector * bits // 8)
                loaded, stored = (loaded + count, stored) if kind == "ld" else (loaded, stored + count)
            elif i.name.startswith("cp.async.c") and "global" in i.name:
                mask = active(i)
                if len(i.operands) > 3 and i.operands[3] not in self.unknown:
                    mask &= np.broadcast_to(value(i.operands[3]) != 0, mask.shape)
                loaded += asked(i.operands[1], mask, int(i.operands[2], 0))
            elif i.name.startswith("bra"):
                if i.guard in self.unknown:  # a function's short cut for some numbers: the long way asks for no less
                    assert self.labels[i.operands[0]] >= at, "a loop depends on data"
                    continue
                taken = active(i)
                assert taken.all() or not taken.any(), "threads part"
                at = self.labels[i.operands[0]] if taken.all() else at
            elif i.name == "ret":
                break
            elif i.operands and i.operands[0][0] == "%" and i.operands[0].split("|")[0] not in self.unknown:
                rule, target = self._rule(i), i.operands[0].split("|")[0]
                if rule is None:
                    continue
                result = rule(*map(value, i.operands[1:]))
                if target.startswith("%r") and not target.startswith("%rd"):  # 32 bits, with a sign
                    result = (np.asarray(result, np.int64) + 2**31) % 2**32 - 2**31
                if i.guard:
                    result = np.where(active(i), result, values.get(target, 0))
                values[target] = result
        return Traffic(loaded, stored)


def traffic(ptx: str, parameters: list[int], grid: tuple[int, ...]) -> Traffic:
    """What all programs of a launch ask for, from some of them."""
    kernel, grid = Program(ptx), (*grid, 1, 1)[:3]
    total = int(np.prod(grid))
    some = np.unique(np.linspace(0, total - 1, MOST_PROGRAMS).astype(int))
    found = Traffic(0, 0)
    for n in map(int, some):
        found += kernel.run(parameters, (n % grid[0], n // grid[0] % grid[1], n // (grid[0] * grid[1])), grid)
    return Traffic(found.loaded * total / len(some), found.stored * total / len(some))
