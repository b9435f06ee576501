"""The files of configs/, by name: configs of OpenMMLab (.py), and recipes of `linescan train` (.toml)."""

from difflib import get_close_matches
from pathlib import Path

from ..errors import InputError

__all__ = ["CONFIGS", "find_config", "list_configs"]

CONFIGS = Path(__file__).parents[1] / "configs"


def list_configs(suffix: str = ".py") -> list[str]:
    """Names of the files that come with linescan: `segmentation/vmamba_tiny_upernet_ade20k`, or with ".toml"
    `restoration/mambair_v2_light_x2`."""
    found = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob(f"*/*{suffix}"))
    return sorted(name for name in found if not name.startswith("_base_"))


def find_config(name: str | Path, suffix: str = ".py") -> Path:
    """The path of a file as it is, or of one that comes with linescan by its name, with its folder's or without.

    Raises:
        InputError: there is none; the line names those that are near.
    """
    if Path(name).is_file():
        return Path(name)
    known = list_configs(suffix)
    wanted = str(name).removeprefix("configs/").removesuffix(suffix)
    matches = [c for c in known if c == wanted or c.rpartition("/")[2] == wanted]
    if len(matches) == 1:
        return CONFIGS / f"{matches[0]}{suffix}"
    near = get_close_matches(wanted, known + [c.rpartition("/")[2] for c in known], 3, 0.5)
    raise InputError(
        f"no {'config' if suffix == '.py' else 'recipe'} {str(name)!r}, neither a file nor one of linescan's"
        + (f"; near it: {', '.join(near)}" if near else f"; there are {', '.join(known[:3])} and {len(known) - 3} more")
    )
