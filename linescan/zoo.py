"""What the authors of each published model report, beside the timm name that builds it.

A backbone module calls `published` once for each of its entries; `linescan list` and the README's table read them.
Numbers are the authors' own (or counted from their files), never measured here: `linescan info` puts both side by side.
"""

from dataclasses import dataclass

__all__ = ["Published", "PUBLISHED", "published"]


@dataclass(frozen=True)
class Published:
    """The facts of one published model; None where its authors give none.

    Attributes:
        params: parameters in millions.
        gmacs: multiply-adds of one image in billions ("FLOPs" in most papers).
        top1: ImageNet-1K accuracy in per cent.
        paper: where it was published, as "venue year, arXiv number".
        licence: of the published weights and code, as an SPDX name.
    """

    params: float | None = None
    gmacs: float | None = None
    top1: float | None = None
    paper: str | None = None
    licence: str | None = None


PUBLISHED: dict[str, Published] = {}
"""By timm name."""


def published(name: str, **facts) -> None:
    """Records the facts of the model that timm knows as `name`; see `Published` for what can be said.

        published("vim_tiny_patch16_224", params=7.15, gmacs=1.5, top1=76.1, paper="ICML 2024, arXiv 2401.09417",
                  licence="Apache-2.0")

    Raises:
        ValueError: `name` has facts already.
    """
    if name in PUBLISHED:
        raise ValueError(f"the published facts of {name} are given twice")
    PUBLISHED[name] = Published(**facts)


def list_models(pattern: str = "") -> list[str]:
    """Names of the registered linescan models that match `pattern` (shell wildcards; "" for all), sorted."""
    from timm.models import list_models as every
    from timm.models import model_entrypoint

    return [name for name in every(pattern) if model_entrypoint(name).__module__.startswith("linescan.")]
