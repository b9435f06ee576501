"""Writing videos."""

from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Iterator

from PIL import Image

from ..engine.atomic import atomic_path

__all__ = ["Film", "write_video"]


class Film:
    """The frames of a video that is being written; see `write_video`."""

    def __init__(self, container, codec: str, rate: Fraction):
        self.container, self.codec, self.rate = container, codec, rate
        self.stream: Any = None  # made for the first frame

    def add(self, image: Image.Image) -> None:
        """One more frame; all have the size of the first, less a column and a row that H.264 cannot hold."""
        if self.stream is None:
            self.stream = stream = self.container.add_stream(self.codec, rate=self.rate)
            stream.width, stream.height, stream.pix_fmt = image.width // 2 * 2, image.height // 2 * 2, "yuv420p"
            if self.codec == "mpeg4":
                stream.bit_rate = stream.width * stream.height * 8
        from av import VideoFrame

        frame = VideoFrame.from_image(image.crop((0, 0, self.stream.width, self.stream.height)))
        self.container.mux(self.stream.encode(frame))

    def end(self) -> None:
        """Writes what the encoder has kept back."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())


@contextmanager
def write_video(path: str | Path, like: str | Path) -> Iterator[Film]:
    """An MP4 file of H.264 (MPEG-4 where that encoder is missing), with the frame rate of the video `like`.

        with write_video("drawn.mp4", like="drive.mp4") as film:
            for image in images:
                film.add(image)

    The file takes its name at the end of the block. If the block raises, the video ends there, but for an `OSError` or
    an interruption: these leave nothing.
    """
    import av

    with av.open(f"file:{like}", options={"protocol_whitelist": "file"}) as container:
        rate = Fraction(container.streams.video[0].average_rate or 25).limit_denominator(65535)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    stopped = None
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        film = Film(container, codec, rate)
        try:
            yield film
        except OSError:
            raise
        except Exception as error:
            stopped = error
        film.end()
    if stopped:
        raise stopped
