"""Official keys of parts of a network, translated before MMEngine loads the whole."""

from torch import nn

__all__ = ["translate_keys"]


def translate_keys(module: nn.Module, state: dict, prefix: str, *_) -> None:
    """A hook before `load_state_dict`: a file's names of a part's parameters become linescan's, in place.

    Args:
        module: the part, with a `checkpoint_filter`.
        state: of the whole network.
        prefix: of the part's keys in it.
    """
    inside = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    if not inside.keys() <= module.state_dict().keys():
        own = module.checkpoint_filter({key: state.pop(full) for key, full in inside.items()})
        state.update({prefix + key: value for key, value in own.items()})
