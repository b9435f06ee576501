"""Reading files of tensors that anyone may have made: safetensors, and PyTorch's zip and legacy formats.

Nothing in a file is run. A PyTorch file is a pickle beside raw storages; here the pickle may build plain values,
dictionaries and tensors, and call nothing but the functions in `GLOBALS`, which are all in this module. Objects that
training programs are known to leave beside the weights become inert stand-ins, anything else is refused by name.

Time and memory are bounded by the size of the file: records are neither compressed nor shared, their checksums are
checked, tensors lie inside their storages, and together they hold at most `LARGEST_TENSORS` times the file's bytes. A
pickle, or a safetensors header, has at most `LARGEST_HEADER` bytes.
"""

import io
import math
import pickle
import stat
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, Callable

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import CheckpointError, one_line

__all__ = ["OddTensor", "read_file", "read_metadata"]

LARGEST_HEADER = 2**25
LARGEST_TENSORS = 4  # some files hold weights twice, under two names

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before torch 1.6

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32,
    "UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


class OddTensor:
    """A tensor of a kind that no model holds; `kind` names it. Its values are not read."""

    def __init__(self, kind: str):
        self.kind = kind


class Refused(Exception):
    """The file would do what no file of weights needs to."""


class _Inert:
    """Stands for an object that is not a weight; holds nothing and does nothing."""


class _Storage:
    """Bytes of a file, and what they are."""

    def __init__(self, data: Tensor, dtype: torch.dtype):
        self.data, self.dtype = data, dtype


# -- what a pickle may call -------------------------------------------------------------------------------------------


def _dense(unpickler, storage, offset, size, stride, *more) -> Tensor:
    """`torch._utils._rebuild_tensor` and its later versions; the third has the dtype among its arguments."""
    if unpickler.storage is None:
        return OddTensor("unread")
    if not isinstance(storage, _Storage) or not isinstance(offset, int):
        raise ValueError("a tensor without a storage")
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in (*size, *stride, offset)):
        raise ValueError("a tensor without a shape")
    dtype = next((value for value in more if isinstance(value, torch.dtype)), storage.dtype)
    flat = storage.data[: len(storage.data) // dtype.itemsize * dtype.itemsize].view(dtype)
    if not math.prod(size):
        return flat.as_strided(size, stride)
    if offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(flat):
        raise ValueError("a tensor is larger than its storage")
    unpickler.spend(math.prod(size) * dtype.itemsize)
    return flat.as_strided(size, stride, offset)


def _same(unpickler, value, *more):
    return value


def _from_type(unpickler, rebuild, cls, args, *more):
    if not isinstance(rebuild, _Call):
        raise ValueError("a tensor that is rebuilt by nothing")
    return rebuild(*args)


def _dictionary(unpickler, *args) -> OrderedDict:
    if args:
        raise ValueError("a dictionary made of other things than its entries")
    return OrderedDict()


def _set(unpickler, values=()) -> set:
    unpickler.spend(8 * len(values))
    return set(values)


def _inert(unpickler, *args) -> _Inert:
    return _Inert()


def _odd(kind: str) -> Callable:
    return lambda unpickler, *args: OddTensor(kind)


GLOBALS: dict[str, Callable] = {
    "collections.OrderedDict": _dictionary,
    "builtins.set": _set,
    "torch._utils._rebuild_tensor": _dense,
    "torch._utils._rebuild_tensor_v2": _dense,
    "torch._utils._rebuild_tensor_v3": _dense,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_qtensor": _odd("quantised"),
    "torch._utils._rebuild_sparse_tensor": _odd("sparse"),
    "torch._utils._rebuild_meta_tensor_no_storage": _odd("meta"),
    "torch._utils._rebuild_nested_tensor": _odd("nested"),
    "torch._utils._rebuild_wrapper_subclass": _odd("wrapped"),
    "torch._utils._rebuild_device_tensor_from_numpy": _odd("device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _odd("device"),
}

# Objects that training programs leave beside the weights, and classes that are only named.
INERT = {
    "argparse.Namespace", "mmengine.logging.history_buffer.HistoryBuffer", "mmengine.config.config.ConfigDict",
    "yacs.config.CfgNode", "easydict.EasyDict", "omegaconf.dictconfig.DictConfig", "pathlib.PosixPath",
    "pathlib.WindowsPath", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray",
    "_codecs.encode", "builtins.getattr", "builtins.slice", "collections.Counter", "collections.defaultdict",
    "datetime.timedelta", "torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout", "torch.per_tensor_affine", "torch.per_channel_affine",
}  # fmt: skip


class _Call:
    """A function of `GLOBALS`, bound to the unpickler that keeps count."""

    def __init__(self, function: Callable, unpickler: "_Unpickler"):
        self.function, self.unpickler = function, unpickler

    def __call__(self, *args):
        self.unpickler.spend(8 * len(args))
        return self.function(self.unpickler, *args)


# Opcodes whose effect is in proportion to their length; those of protocol 0 in text, and of the copy registry, are
# none that torch writes.
OPCODES = {
    getattr(pickle, name)[0]
    for name in (
        "PROTO", "STOP", "FRAME", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
        "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
        "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_LIST", "APPEND", "APPENDS", "LIST",
        "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET",
        "ADDITEMS", "FROZENSET", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL",
        "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
    )
}  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, in Python, with only the opcodes and globals that a file of weights needs.

    Args:
        file: the pickle.
        storage: (dtype, key, number of elements) -> the storage of that name; None to read none.
        budget: bytes that all tensors together may have.
    """

    dispatch = {code: method for code, method in pickle._Unpickler.dispatch.items() if code in OPCODES}

    def __init__(self, file: BinaryIO, storage: Callable | None, budget: int):
        super().__init__(file, encoding="latin1")
        self.storage, self.budget = storage, budget

    def spend(self, size: int) -> None:
        """Counts what a call makes. Raises ValueError: more than the file can hold."""
        self.budget -= size
        if self.budget < 0:
            raise ValueError("its tensors are larger than the file")

    def find_class(self, module: str, name: str):
        module = "builtins" if module == "__builtin__" else module  # its name in Python 2
        full = f"{module}.{name}"
        if full in GLOBALS:
            return _Call(GLOBALS[full], self)
        if module in ("torch", "torch.storage", "torch.cuda") and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if full in INERT:
            return _Call(_inert, self)
        raise Refused(full)

    def persistent_load(self, pid):
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise ValueError("a reference to nothing")
        _, dtype, key, _, count, *view = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(count, int) or any(v is not None for v in view):
            raise ValueError("a storage of no known type")
        return self.storage and self.storage(dtype, str(key), count)

    def load_build(self):
        """The state of an object: stand-ins have none, and those of dictionaries are notes of torch's."""
        self.stack.pop()

    def load_reduce(self):
        args = self.stack.pop()
        if not isinstance(self.stack[-1], _Call):
            raise ValueError("a call of what is no function")
        self.stack[-1] = self.stack[-1](*args)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce


# -- formats ----------------------------------------------------------------------------------------------------------


def _bytes(count: int, fill: Callable[[memoryview], int]) -> Tensor:
    """A tensor of `count` bytes, filled by `fill`, which returns how many there were."""
    if not count:
        return torch.empty(0, dtype=torch.uint8)
    data = bytearray(count)
    if fill(memoryview(data)) != count:
        raise ValueError("the end is missing")
    return torch.frombuffer(data, dtype=torch.uint8)


def _read_zip(file: BinaryIO, length: int, tensors: bool) -> object:
    """The format of torch 1.6 and later: a zip archive of a pickle and one record per storage."""
    archive = zipfile.ZipFile(file)
    records = {info.filename: info for info in archive.infolist()}
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise ValueError("a compressed archive is none that torch writes")
    if sum(info.file_size for info in archive.infolist()) > length:
        raise ValueError("its records are larger than the file")
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("an archive without weights")
    folder = pickles[0].removesuffix("data.pkl")
    for info in records.values():
        if info.CRC == 0:  # written without checksums
            del info.CRC

    def read(name: str) -> Tensor:
        info = records[folder + name]
        with archive.open(info) as record:
            return _bytes(info.file_size, record.readinto)  # type: ignore[attr-defined]

    if folder + "byteorder" in records and bytes(read("byteorder").tolist()) != b"little":
        raise ValueError("written on a big-endian machine")
    if records[pickles[0]].file_size > LARGEST_HEADER:
        raise ValueError(f"its pickle is larger than {LARGEST_HEADER} bytes")
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
        if key not in storages:
            storages[key] = read(f"data/{key}")
        return _Storage(storages[key], dtype)

    with archive.open(pickles[0]) as record:
        content = io.BytesIO(record.read())
    return _Unpickler(content, storage if tensors else None, LARGEST_TENSORS * length).load()


def _read_legacy(file: BinaryIO, length: int, tensors: bool) -> object:
    """The format before torch 1.6: pickles of a number, a version, the machine, the content and the storages' keys;
    then the storages, each after its number of elements."""
    head = io.BytesIO(file.read(LARGEST_HEADER))
    storages: dict[str, tuple[Tensor, torch.dtype]] = {}
    held = 0

    def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
        nonlocal held
        if key not in storages:
            held += count * dtype.itemsize
            if count < 0 or held > length:
                raise ValueError("its storages are larger than the file")
            storages[key] = _bytes(count * dtype.itemsize, len), dtype
        return _Storage(*storages[key])

    def load() -> Any:
        return _Unpickler(head, storage if tensors else None, LARGEST_TENSORS * length).load()

    if load() != MAGIC:
        raise Refused("pickle.load: it is a pickle that torch did not write")
    version, machine, content, keys = load(), load(), load(), load()
    if version != 1001 or not isinstance(machine, dict) or not machine.get("little_endian"):
        raise ValueError("of another version, or another machine")
    file.seek(head.tell())
    for key in keys if tensors else ():
        data, dtype = storages[str(key)]
        if int.from_bytes(file.read(8), "little") * dtype.itemsize != len(data):
            raise ValueError("a storage of another size than it says")
        if len(data) and file.readinto(data.numpy()) != len(data):  # type: ignore[attr-defined]
            raise ValueError("the end is missing")
    return content


def _check_header(head: bytes, length: int) -> None:
    size = int.from_bytes(head[:8], "little")
    if size > min(length - 8, LARGEST_HEADER):
        raise ValueError(f"a header of {size} bytes")


def _open(path: Path) -> tuple[BinaryIO, int, bytes]:
    """The file, its length and its first 16 bytes."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a folder; give a checkpoint file (.safetensors, .pth)")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a file; give a checkpoint file (.safetensors, .pth)")
    file = open(path, "rb")
    return file, status.st_size, file.read(16)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"


def read_file(path: str | Path, tensors: bool = True) -> object:
    """What a checkpoint file holds: of a safetensors file a dictionary of tensors, of a PyTorch file plain values,
    containers, tensors (on the CPU), `OddTensor`s and stand-ins.

    Args:
        path: of the file.
        tensors: False to leave those of a PyTorch file unread, each an `OddTensor`.

    Raises:
        CheckpointError: the file is missing, damaged, too large for what it says, or would run code.
    """
    path = Path(path)
    with _one_line(path):
        file, length, head = _open(path)
        with file:
            if len(head) < 16:
                raise CheckpointError(f"{path} is empty or cut short ({length} bytes)")
            file.seek(0)
            if _is_safetensors(head):
                _check_header(head, length)
                return safetensors.torch.load_file(path)
            if head[:4] == b"PK\x03\x04":
                return _read_zip(file, length, tensors)
            if head[:1] == b"\x80":
                return _read_legacy(file, length, tensors)
    raise CheckpointError(f"{path} is neither a safetensors nor a PyTorch file (it starts with {head[:8]!r})")


def read_metadata(path: str | Path) -> dict[str, str] | None:
    """The metadata in the header of a safetensors file; None for a file of another format.

    Raises:
        CheckpointError: the file is missing, or a damaged safetensors file.
    """
    path = Path(path)
    with _one_line(path):
        file, length, head = _open(path)
        file.close()
        if not _is_safetensors(head):
            return None
        _check_header(head, length)
        with safetensors.safe_open(path, "pt") as opened:
            return opened.metadata() or {}


class _one_line:
    """Whatever goes wrong inside becomes one CheckpointError with one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or isinstance(error, CheckpointError) or not isinstance(error, Exception):
            return False
        if isinstance(error, Refused):
            raise CheckpointError(f"{self.path} would run code on loading ({one_line(error)}); refused") from None
        if isinstance(error, zipfile.BadZipFile) and "not a zip file" in str(error):
            raise CheckpointError(f"{self.path} is cut short: its zip directory is missing") from None
        if isinstance(error, OSError) and error.strerror:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        raise CheckpointError(f"{self.path} is damaged or cut short ({one_line(error)})") from error
