"""One process or many: the few things that differ when `torchrun` starts several, and how runs of their own begin."""

import multiprocessing
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Callable, Iterator

import torch
import torch.distributed as dist

from ..errors import InputError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

__all__ = ["Processes", "beginner", "interruptible", "keep_memory", "pick_device", "processes", "threads", "words_to"]


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next tensors, up to 62 MB of it at a time.

    It returns large blocks to the system, which clears every page of the next ones: up to a fifth of a forward. The
    first large block that is freed decides how large they are; one of 32 MB would be too large.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best there is: CUDA, then the CPU, whose memory is kept (`keep_memory`).

    Raises:
        InputError: no such device here, or one that computes nothing ("meta").
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        keep_memory()
    return device


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are; 1 outside torchrun.
        device: where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def copy_from_first(self, x: torch.Tensor) -> None:
        """Gives `x`, in place, the values that it has in the first process."""
        if self.count > 1:
            dist.broadcast(x, 0)

    def share(self, value) -> list:
        """The `value` of each process (plain values, tensors), by rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Returns once every process has come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Joins the other processes if `torchrun` started this one (gloo on CPUs, NCCL on CUDA); leaves them at the end."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield Processes(0, 1, pick_device(device))
        return
    where = pick_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), count, where)
    finally:
        dist.destroy_process_group()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """In the block, torch computes with so many threads. Small models want one: more would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function for a loop to call, which raises KeyboardInterrupt if there was a Ctrl-C in the block.

    Python drops the KeyboardInterrupt that comes up within a destructor or a callback, and goes on. Outside the main
    thread, and where Ctrl-C is handled otherwise, the function does nothing.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield lambda: None
        return
    came = False

    def handle(*_) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def beginner() -> "SpawnContext | ForkServerContext":
    """The context of `multiprocessing` for runs in processes of their own.

    They are forked from a process that has imported linescan and has done nothing else, where the system can do so:
    the imports take seconds, a fork takes none. CUDA does not outlive a fork: beside a GPU each process imports anew.
    """
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["linescan", "linescan.engine.training"])
    return context


def words_to(log: Path) -> None:
    """From here on, all that this process and its libraries print is added to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
