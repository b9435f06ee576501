"""Losses of semantic change detection: SeK, Lovasz and the likeness of what has not changed.

Mamba-FCS (Wijenayake et al., arXiv 2508.08232) trains on their sum with cross entropy. All are computed in float32 at
least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .change_scores import kappa_of
from .mask_sets import IGNORED

__all__ = ["lovasz_softmax", "sek_loss", "similarity_loss"]


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """The Lovasz extension of 1 - IoU, the mean over the classes in `labels` (Berman et al., arXiv 1705.08790).

    Of all pixels of the batch together, without those whose label is `IGNORED`; 0 where there are no others.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W), int64.
    """
    known = labels != IGNORED
    probabilities, labels = _probabilities(logits).movedim(1, -1)[known], labels[known]
    losses = []
    for number in labels.unique().tolist():
        mine = (labels == number).to(probabilities)
        errors, order = (mine - probabilities[:, number]).abs().sort(descending=True)
        mine = mine[order]
        union = mine.sum() + (1 - mine).cumsum(0)
        jaccard = 1 - (mine.sum() - mine.cumsum(0)) / union
        losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def similarity_loss(before: Tensor, after: Tensor, unchanged: Tensor) -> Tensor:
    """The squared difference of both dates' probabilities where nothing has changed, the mean over all pixels.

    Args:
        before, after: logits (B, C, H, W).
        unchanged: (B, H, W) bool.
    """
    difference = _probabilities(before) - _probabilities(after)
    return (difference * unchanged[:, None]).square().mean()


def sek_loss(
    before: Tensor,
    after: Tensor,
    labels: tuple[Tensor, Tensor],
    changed: Tensor,
    beta: float = 1.5,
    gamma: float = 0.5,
    eps: float = 1e-6,
) -> Tensor:
    """The separated kappa of soft confusion matrices of the changed pixels, as a loss.

        max(0, -log(kappa exp(beta IoU) + eps) - gamma log(IoU + 1e-6))

    kappa and IoU are means over both dates; IoU is a mean over the classes but 0, in which a class of n pixels weighs
    1 / log(n + 1 + eps). Where kappa is negative, which makes the published loss NaN, it counts as 0. Without changed
    pixels the loss is 0.

    Args:
        before, after: logits (B, C, H, W), of which class 0 is "unchanged".
        labels: of both dates, (B, H, W), int64. A changed pixel whose label is `IGNORED` at one date is left out there.
        changed: (B, H, W) bool.
        beta, gamma: exponent and weight of the IoU.
        eps: added where something may be 0. The published loss has 1e-7 in its first call, 1e-6 from then on.
    """
    if not changed.any():
        return (before.sum() + after.sum()) * 0
    kappas, ious = zip(*(_soft_agreement(x, y, changed, eps) for x, y in zip((before, after), labels)))
    kappa, iou = sum(kappas) / 2, sum(ious) / 2
    sek = kappa.clamp_min(0) * torch.exp(beta * iou)
    return (-torch.log(sek + eps) - gamma * torch.log(iou + 1e-6)).clamp_min(0)


def _soft_agreement(logits: Tensor, labels: Tensor, changed: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Kappa, and the weighted mean IoU, of one date."""
    chosen = changed & (labels != IGNORED)
    probabilities = _probabilities(logits).movedim(1, -1)[chosen]
    truth = F.one_hot(labels[chosen], logits.shape[1]).to(probabilities)
    confusion = (probabilities.mT @ truth)[1:, 1:]
    found, there = probabilities.sum(0)[1:], truth.sum(0)[1:]
    both = confusion.diagonal()
    weights = 1 / torch.log(there + 1 + eps)
    iou = (both / (found + there - both + eps) * weights / weights.sum()).sum()
    return kappa_of(confusion, eps), iou
