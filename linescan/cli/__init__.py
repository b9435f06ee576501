"""The `linescan` command.

options.py     the application, and the options that several commands share
show.py        list, info, doctor, routes
predict.py     classify, segment, detect
train.py       train, evaluate
measure.py     benchmark, directions
demo.py        demo
"""

import sys
from importlib import import_module

from linescan.checkpoint import CheckpointError
from linescan.errors import Diverged, InputError

from .options import app

__all__ = ["app", "main"]

for module in ("show", "predict", "train", "measure", "demo"):  # the order of --help
    import_module(f".{module}", __name__)


def main() -> None:
    """Runs the command; what the user can fix is told in one line, with exit status 2."""
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="linescan", standalone_mode=False) or 0
    except (InputError, CheckpointError) as error:
        status = _complain(error, 2)
    except Diverged as error:
        status = _complain(error, 1)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the command line parser's
            raise
        status = _complain(error.format_message(), error.exit_code)
    sys.exit(status)


def _complain(error: object, status: int) -> int:
    line = " ".join(str(error).split())
    print(f"linescan: {line}", file=sys.stderr)
    return status
