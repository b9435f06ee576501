"""How Triton kernels are tested where no GPU is: in Triton's interpreter, and compiled for GPUs that are not there.

Triton decides when it is imported, and for each kernel when its module is, whether to interpret or to compile. So both
happen in a process of their own. A test file says

    @in_interpreter
    def test_something(): ...       # runs where TRITON_INTERPRET=1, and is not there otherwise

and is found by test_triton.py's test_in_the_interpreter, which has all such files run. What is compiled says

    def launches(): ...             # calls operators with CPU tensors of real sizes

    @outside_interpreter
    def test_compiles():
        for _, kernels in compiled("tests.scans.test_this_file:launches"):
            assert {kernel["name"] for kernel in kernels} == {"_forward", "_backward"}
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import pytest
import torch

from ..conftest import ENVIRONMENT
from ..runs import Forked

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
LIMITS = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # shared memory of a block
TIGHTEST = min(LIMITS, key=LIMITS.__getitem__)
RECORD = HERE / "compiled.json"  # what kernels take that were compiled before, by their keys
CALLS = [  # every kind of route (`tools.table`), merge and dtype, tokens that routes share or not
    ("none", None, torch.float32, False),
    ("permutation", "sum", torch.float32, True),
    ("per_sample", None, torch.float32, False),
    ("repeated", "sum", torch.bfloat16, False),
    ("padded", None, torch.float16, True),
]


@cache
def _adapt_interpreter() -> None:
    """Makes Triton's interpreter fit for NumPy 2.4, and quicker."""
    import triton.language as language
    import triton.runtime.interpreter as interpreter

    patch_language, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    of_any, of_numbers = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)
    everything = SimpleNamespace(__globals__={"language": language, "core": language.core})

    class Scope(interpreter._LangPatchScope):
        """What a kernel patches, its functions find; the interpreter would look for it again at each call of them."""

        open = False

        def restore(self):
            super().restore()
            Scope.open = False

    def patched_language(function):
        if Scope.open:
            return Scope()
        scope = patch_language(everything)
        Scope.open = True
        return scope

    def patched_tensor(tensor, scope):  # an array of one element is no index any more
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dtype(kind):  # of numbers it is looked up once
        return of_any(kind) if kind.scalar.is_ptr() else of_numbers(kind.scalar)

    core = language.core
    new_block, new_tuple, types = core.block_type.__init__, core.tuple.__init__, {}

    def block(self, element, shape):  # the same few types again and again
        key = element.name, *map(int, shape)
        if key not in types:
            new_block(self, element, shape)
            dimensions = core.tuple(map(core.constexpr, self.shape))
            types[key] = self.__dict__ | dict(dimensions=dimensions, elements=core.constexpr(self.numel))
        self.__dict__.update(types[key])

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = (type.dimensions, type.elements) if type.is_block() else scalar

    def values(self, args, type=None):  # whose type nobody asks for but where it is given
        if type is None:
            self.values = list(args)
        else:
            new_tuple(self, args, type)

    core.block_type.__init__, core.tensor.__init__, core.tuple.__init__ = block, tensor, values
    scalar = core.tuple(()), core.constexpr(1)
    interpreter._LangPatchScope, interpreter._get_np_dtype = Scope, dtype
    interpreter._patch_lang, interpreter._patch_lang_tensor = patched_language, patched_tensor


def in_interpreter(test):
    """Decorator of a test that interprets kernels."""
    if INTERPRETING:
        _adapt_interpreter()
        return test


def outside_interpreter(test):
    """Decorator of a test that starts processes of its own."""
    return None if INTERPRETING else test


@pytest.fixture(autouse=INTERPRETING)
def no_stray_access(monkeypatch):
    """Every pointer that a kernel follows must lie in one of its arguments."""
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    spans = []
    prepare = interpreter.GridExecutor._init_args_hst
    load, store = (getattr(interpreter.InterpreterBuilder, f"create_masked_{kind}") for kind in ("load", "store"))

    def note(arguments):
        for x in arguments:
            if isinstance(x, torch.Tensor):
                spans.append((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()))
            elif isinstance(x, tuple):
                note(x)

    def noted(self, *args):
        positional, named = prepare(self, *args)
        spans.clear()
        note((*positional, *named.values()))
        return positional, named

    def check(pointers, mask):
        followed = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        inside = np.zeros(followed.shape, bool)
        for start, size in spans:
            inside |= (followed >= start) & (followed < start + size)
        assert inside.all(), "a kernel leaves its arguments' memory"

    def checked_load(self, pointers, mask, *args):
        check(pointers, mask)
        return load(self, pointers, mask, *args)

    def checked_store(self, pointers, value, mask, *args):
        check(pointers, mask)
        return store(self, pointers, value, mask, *args)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", noted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)


def interpret(*files: Path) -> None:
    """Runs the tests of some files that are for the interpreter."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, files)]
    environment = ENVIRONMENT | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


def compiled(launches: str, archs: tuple[int, ...] = (TIGHTEST,)) -> list[tuple[int, list[dict]]]:
    """The kernels that a function launches, for each architecture; all fit its shared memory.

    Those that compiled.json knows are not compiled again. All kernels for one architecture take minutes: the other
    architectures are for `tools/kernels.py --arch`.

    Args:
        launches: "MODULE:FUNCTION".
        archs: some of those of `LIMITS`.
    """
    done = Forked(HERE.parents[1], main, launches, *map(str, archs)).end()
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["shared"] <= LIMITS[kernel["arch"]], kernel
    return [(arch, [kernel for kernel in kernels if kernel["arch"] == arch]) for arch in archs]


def _resources(cubin: bytes) -> dict[str, int]:
    """What a thread of a compiled kernel takes, as the tool that comes with Triton says it."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {
        name: int(re.search(f"{key}:(\\d+)", told.stdout)[1])
        for name, key in (("registers", "REG"), ("stack", "STACK"))
    }


def pretend(arch: int, launched: Callable) -> None:
    """From now on kernels are compiled for a GPU and not run: `launched(function, kernel, args, options, grid)` is."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Pretended:
        """A driver that knows its GPU but cannot run anything on it."""

        def __init__(self, arch: int):
            self.arch = arch

        def get_current_target(self):
            return GPUTarget("cuda", self.arch, 32)

        def get_current_device(self):
            return self.arch  # kernels are cached a device

        def get_current_stream(self, device):
            return 0

    compile_ = getattr(JITFunction.run, "compiles", JITFunction.run)

    def only_compile(self, *args, grid, warmup, **options):
        kernel = compile_(self, *args, grid=grid, warmup=True, **options)
        launched(self, kernel, args, options, grid)
        return kernel

    only_compile.compiles = compile_
    JITFunction.run = only_compile
    kernels = import_module("linescan.scans.kernels.triton")
    kernels._fits = lambda *args: True  # CPU tensors stand for CUDA ones
    triton.runtime.driver.set_active(Pretended(arch))


def _remember(known: dict[str, dict]) -> None:
    """Triton compiles from now on only what is not in `known`; kernels have a `key`, by which they are found there.

    The key is of all that what a kernel takes depends on: its source, that of the functions it calls, what it is
    compiled for, and Triton's version. A changed kernel is compiled again.
    """
    import triton

    compile_ = triton.compiler.compile

    def compile(src, target, options):
        settings = [(key, str(value)) for key, value in sorted(options.items()) if key != "extern_libs"]  # a path
        key = sha256(str((triton.__version__, target.arch, src.hash(), settings)).encode()).hexdigest()[:32]
        kernel = SimpleNamespace(**known[key]) if key in known else compile_(src, target=target, options=options)
        kernel.key = key
        return kernel

    triton.compiler.compile = compile


def main(launches: str, *archs: str) -> None:
    """Prints one JSON line a kernel: module, name, arch, options, shared (bytes of shared memory of a block), registers
    and stack (bytes, what registers have no room for) of a thread, and the key that compiled.json has it by."""
    seen, known = set(), json.loads(RECORD.read_text())
    _remember(known)
    for arch in map(int, archs):

        def launched(function, kernel, args, options, grid):
            if kernel.key in seen:
                return
            seen.add(kernel.key)
            shown = {key: str(value) for key, value in options.items()}
            about = dict(module=function.fn.__module__.rpartition(".")[2], name=function.__name__, options=shown)
            takes = known.get(kernel.key)
            takes = takes or dict(shared=kernel.metadata.shared, **_resources(kernel.asm["cubin"]))
            print(json.dumps(about | dict(arch=arch, key=kernel.key) | takes))

        pretend(arch, launched)
        module, function = launches.split(":")
        getattr(import_module(module), function)()
    sys.stdout.flush()
    os._exit(0)  # LLVM's own clean-up may crash where no driver is


if __name__ == "__main__":
    main(*sys.argv[1:])
