"""The user's side of every task: files in, answers out.

A **tool** is a model on a device that answers inputs. A **writer** saves answers, and knows no tool. `run` applies a
tool to sources (`linescan.media.find`), and gives what it answers to a writer. A new task is a subclass of each:

    class Restorer(Tool):
        def open(self, given): ...                      # read one input
        def answer(self, opened, progress): ...         # one forward pass for a few of them
        def draw(self, opened, answer, frame=False): ...

Whatever is wrong with one input is its error alone; all others are answered.
"""

import errno
from contextlib import ExitStack
from html import escape
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from ..engine.atomic import atomic, identities, inputs_kept
from ..engine.processes import pick_device
from ..engine.scores import precision
from ..errors import CommandError, InputError
from ..media.find import Source
from ..media.formats import is_video
from ..media.video import open_video
from ..media.write import write_video

__all__ = ["Outcome", "Progress", "Tool", "Writer", "expect_finite", "run"]

Progress = Callable[[float], None]
"""Called with the share of the work on one input that has been done since the last call; 1 in all."""


def silent(share: float) -> None:
    """A `Progress` that is not shown."""


def expect_finite(answer: Tensor, large: bool = False) -> Tensor:
    """The network's answer.

    Args:
        large: look at the sum: a mask of all values would take memory.

    Raises:
        InputError: it is not finite.
    """
    if not (answer.sum().isfinite() if large else answer.isfinite().all()):
        raise InputError("the model answers NaN or infinity; its weights are damaged, or the precision too low")
    return answer


class Tool:
    """A model on a device, applied to a stream of inputs.

    An input is what `open` takes: a path, an image, an array; for a tool that reads two files at a time a tuple.

    Args:
        model_name: what the model is called.
        module: the network.
        device: by default CUDA where there is one.
        dtype: torch.float32, or torch.bfloat16 or torch.float16 for half precision.
        batch: inputs in one forward pass.
        strict: refuse videos that are cut short or damaged, instead of answering what can be read.

    Attributes:
        kinds: what is looked for in folders (`linescan.media.find.KINDS`).
        whole_videos: whether a video is one input; otherwise each of its frames is.
    """

    kinds: Sequence[str] = ("image", "video")
    whole_videos = False

    def __init__(
        self,
        model_name: str,
        module: nn.Module,
        device: str | None,
        dtype: torch.dtype,
        batch: int,
        strict: bool = False,
    ):
        if not isinstance(batch, int) or batch < 1:
            raise InputError(f"a batch is a number of inputs, 1 or more, not {batch!r}")
        self.model_name, self.device, self.dtype, self.batch = model_name, pick_device(device), dtype, batch
        self.strict = strict
        self.precision()  # refuses other types
        self.module = module.to(self.device).eval()

    # -- what a task defines -------------------------------------------------------------------------------------------

    def open(self, given: Any) -> Any:
        """Reads one input. Whatever it raises is the error of this input."""
        raise NotImplementedError

    def expect(self, inputs: Sequence[Any]) -> None:
        """Looks at all inputs of a command before any is opened.

        Raises:
            InputError: something is wrong with all of them, such as the number of files that are read together.
        """
        files = max((len(given) for given in inputs if isinstance(given, tuple)), default=1)
        if files > 1:
            raise InputError(f"{self.model_name} reads one file at a time, not {files} together")

    def answer(self, opened: Sequence[Any], progress: Progress) -> Sequence[Any]:
        """The answers for at most `batch` opened inputs. If it raises, they are tried again one by one.

        Raises:
            CommandError: what is wrong with every input alike; all ends with it.
        """
        raise NotImplementedError

    def draw(self, opened: Any, answer: Any, frame: bool = False) -> Image.Image:
        """The answer as an image, over the input. As `frame` of a video, drawings of one size have one size."""
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        """What there is to know of this tool, by name."""
        count = sum(p.numel() for p in self.module.parameters())
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "model": self.model_name,
            "parameters": f"{count / 1e6:.2f} M parameters",
            "device": f"{self.device}, {dtype}",
        }

    # -- what all share ------------------------------------------------------------------------------------------------

    def precision(self):
        """The context in which the network runs."""
        return precision(self.device, self.dtype)

    def each(
        self, inputs: Iterable[Any], progress: Progress = silent, expect: Callable[[int, Any], None] | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """For each input in turn (opened, answer); the answer is an InputError where there is none.

        `inputs` may be endless: they are taken `batch` at a time. What cannot be opened is None.

        Args:
            inputs: what `open` takes.
            progress: gets the shares of the work on each.
            expect: gets the number of each input and what was opened, before it is answered; what it raises is the
                error of this input.
        """
        numbered = enumerate(inputs)
        while together := list(islice(numbered, self.batch)):
            opened, answers = {}, {}
            for i, given in together:
                try:
                    one = self.open(given)
                    if expect:
                        expect(i, one)
                    opened[i] = one
                except Exception as error:
                    answers[i] = _refusal(error)
            answers |= self._answers(opened, progress)
            yield from ((opened.pop(i, None), answers.pop(i)) for i, _ in together)

    def _answers(self, opened: dict[int, Any], progress: Progress) -> dict[int, Any]:
        if not opened:
            return {}
        try:
            with torch.inference_mode(), self.precision():
                return dict(zip(opened, self.answer(list(opened.values()), progress), strict=True))
        except CommandError:
            raise
        except Exception as error:
            if len(opened) == 1:
                return dict.fromkeys(opened, _refusal(error))
        alone = [self._answers({i: one}, progress) for i, one in opened.items()]  # the others are to be answered
        return {i: answer for answers in alone for i, answer in answers.items()}

    def __call__(self, inputs: Any) -> Any:
        """The answer for an input; a list of answers for a list of inputs.

        Raises:
            InputError: one that cannot be read or answered.
        """
        several = isinstance(inputs, (list, tuple))
        answers = []
        for _, answer in self.each(inputs if several else [inputs]):
            if isinstance(answer, InputError):
                raise answer
            answers.append(answer)
        return answers if several else answers[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.facts().values())})"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in self.facts().items())
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def _refusal(error: Exception) -> InputError:
    """What is wrong with an input, in one line."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, MemoryError):
        said = "it takes more memory than there is"
    else:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        said = said if isinstance(error, (OSError, RuntimeError, ValueError)) else f"{type(error).__name__}: {said}"
    refusal = InputError(said)
    refusal.__cause__ = error
    return refusal


class Writer:
    """Saves the answers of a tool; this one saves nothing."""

    def expect(self, source: Source, opened: Any) -> None:
        """Looks at what was opened of a source, before it is answered.

        Raises:
            InputError: its answer could not be saved.
        """

    def save(self, source: Source, answer: Any, frame: int | None = None) -> list[Path]:
        """Writes the answer for a source, or for a frame of it; returns the files."""
        return []

    def describe(self, answer: Any) -> str:
        """The answer in a few words."""
        raise NotImplementedError

    def as_json(self, answer: Any) -> Any:
        """The answer in JSON's types."""
        raise NotImplementedError

    def sum_up(self, frames: int) -> str:
        """The answers for the frames that were saved last, a video's, in a few words."""
        return f"{frames} frame{'s' * (frames != 1)}"

    def close(self) -> None:
        """Writes what belongs to all answers together."""


class Outcome(NamedTuple):
    """What came of one source.

    Attributes:
        source: the source.
        said: its answer in a few words; empty if there is none.
        answer: in JSON's types; of a video by frames a list. None if there is none.
        files: what was written.
        error: why there is no answer, or none for the rest of the video.
    """

    source: Source
    said: str = ""
    answer: Any = None
    files: Sequence[Path] = ()
    error: InputError | None = None

    def as_dict(self) -> dict:
        """In JSON's types: `source`, and what there is of `answer` (of a video `frames`), `files` and `error`."""
        given = self.source.given
        key = "frames" if isinstance(self.answer, _Frames) else "answer"
        facts = {
            "source": [str(p) for p in given] if isinstance(given, tuple) else str(given),
            key: self.answer,
            "files": [str(path) for path in self.files],
            "error": self.error and str(self.error),
        }
        return {key: value for key, value in facts.items() if value is not None and (key != "files" or value)}


class _Frames(list):
    """The answers for the frames of a video."""


def run(
    tool: Tool, writer: Writer, sources: Sequence[Source], overlays: Path | None = None, progress: Progress = silent
) -> Iterator[Outcome]:
    """Answers, saves and draws one source after the other.

    Args:
        tool, writer: of the same task.
        sources: see `linescan.media.find`. Those that have an error already come out with it.
        overlays: the folder of drawings; None for no drawings.
        progress: gets the shares of the work as they are done, 1 for each source.

    Raises:
        OSError: an answer cannot be written. What was answered before is saved.
        CommandError: what is wrong with every input alike.
    """
    done = 0.0

    def advance(share: float) -> None:
        nonlocal done
        share = max(min(share, len(sources) - done), 0)
        done += share
        progress(share)

    inputs = identities(path for source in sources for path in (source.path, *source.partners))
    work = _Work(tool, writer, overlays, advance, inputs)
    try:
        for i, outcome in enumerate(work.outcomes(sources), 1):
            advance(i - done)
            yield outcome
    finally:
        writer.close()


class _Work(NamedTuple):
    """A run: what all its steps need."""

    tool: Tool
    writer: Writer
    overlays: Path | None
    progress: Progress
    inputs: frozenset

    def outcomes(self, sources: Sequence[Source]) -> Iterator[Outcome]:
        for kind, group in groupby(sources, self._kind):
            group = list(group)
            if kind == "refused":
                yield from (Outcome(source, error=source.error) for source in group)
            elif kind == "frames":
                yield from map(self._video, group)
            else:

                def expect(i: int, opened: Any, group: list[Source] = group) -> None:
                    with inputs_kept(self.inputs):
                        self.writer.expect(group[i], opened)

                answered = self.tool.each((source.given for source in group), self.progress, expect)
                yield from (self._keep(source, *pair) for source, pair in zip(group, answered))

    def _kind(self, source: Source) -> str:
        if source.error:
            return "refused"
        return "frames" if is_video(source.path) and not self.tool.whole_videos else "whole"

    def _keep(self, source: Source, opened: Any, answer: Any) -> Outcome:
        """Saves and draws the answer for a whole source."""
        if isinstance(answer, InputError):
            return Outcome(source, error=_named(answer, source))
        try:
            with inputs_kept(self.inputs):
                files = self.writer.save(source, answer)
                if self.overlays:
                    files.append(path := self._overlay(source, ".jpg"))
                    with atomic(path) as file:
                        self.tool.draw(opened, answer).save(file, "JPEG", quality=92)
            return Outcome(source, self.writer.describe(answer), self.writer.as_json(answer), files)
        except Exception as error:
            if _fatal(error):
                raise
            return Outcome(source, error=_named(_refusal(error), source))

    def _video(self, source: Source) -> Outcome:
        """Saves and draws the answers for the frames of a video, up to the first that has none."""
        answers, files, refusal = _Frames(), [], None
        try:
            with inputs_kept(self.inputs), ExitStack() as stack:
                video, film = open_video(source.path, self.tool.strict), None
                frames = video.images(range(len(video)), 3)
                for opened, answer in self.tool.each(frames, lambda share: self.progress(share / len(video))):
                    if isinstance(answer, InputError):
                        raise answer
                    files += self.writer.save(source, answer, len(answers))
                    if self.overlays:
                        drawn = self.tool.draw(opened, answer, frame=True)
                        film = film or stack.enter_context(write_video(self._overlay(source, ".mp4"), source.path))
                        film.add(drawn)
                    answers.append(self.writer.as_json(answer))
        except Exception as error:
            if _fatal(error):
                raise
            refusal = _refusal(error)
            if answers:
                refusal = InputError(f"{refusal} (after {self.writer.sum_up(len(answers))})")
            refusal = _named(refusal, source)
        if self.overlays and answers:
            files.append(self._overlay(source, ".mp4"))
        said = "" if refusal else self.writer.sum_up(len(answers))
        return Outcome(source, said, None if refusal and not answers else answers, files, refusal)

    def _overlay(self, source: Source, suffix: str) -> Path:
        path = self.overlays / (source.name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _named(error: InputError, source: Source) -> InputError:
    """The error, naming the source, and what was to be read with it."""
    paths = [str(path) for path in (source.path, *source.partners)]
    if any(path in str(error) for path in paths):
        return error
    named = InputError(f"{' and '.join(paths)}: {error}")
    named.__cause__ = error.__cause__
    return named


_OF_ONE_FILE = (None, errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG)


def _fatal(error: Exception) -> bool:
    """Whether it holds for the following files as well, as a full disk does."""
    return isinstance(error, CommandError) or (isinstance(error, OSError) and error.errno not in _OF_ONE_FILE)
