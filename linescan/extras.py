"""Packages that linescan works without, until something that needs one of them is asked for."""

from importlib.util import find_spec

from .errors import InputError

__all__ = ["require"]


def require(package: str, extra: str) -> None:
    """Checks that an optional package is installed, before any work is done that would end for want of it.

    Raises:
        InputError: it is not; the line says which extra of linescan brings it.
    """
    if find_spec(package) is None:
        raise InputError(f"this needs {package}; `pip install 'linescan[{extra}]'` installs it")
