"""Scores over batches and processes."""

import json

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from linescan.engine.processes import Processes, processes
from linescan.engine.scores import Evaluator, Totals, evaluate, precision
from linescan.errors import InputError
from linescan.tasks.classify import Accuracy

from ..runs import in_two

ALONE = Processes(0, 1, torch.device("cpu"))


class Constant(nn.Module):
    """Answers with the batch it is given."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout()

    def forward(self, x):
        assert not self.training and not self.inner.training
        return x


class Labelled(Dataset):
    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"input": self.inputs[index], "label": self.labels[index]}


class Ranking(Evaluator):
    """An area under a curve: no mean over batches."""

    names, primary = ("auroc",), "auroc"

    def __init__(self, data):
        self.data = data

    def measure(self, model, batch, totals):
        totals.keep(score=model(batch[0]), label=batch[1])

    def scores(self, totals):
        return {"auroc": roc_auc_score(totals["label"], totals["score"])}


def test_totals():
    totals = Totals()
    totals.add(loss=torch.tensor(1.5), count=2)
    totals.add(loss=torch.tensor(2.0), count=1, confusion=torch.eye(2))
    totals.keep(rows=torch.arange(3))
    totals.keep(rows=torch.arange(2))
    totals.reduce(ALONE)
    assert totals["loss"].item() == 3.5 and totals["count"].item() == 3
    assert torch.equal(totals["confusion"], torch.eye(2).double()) and totals["rows"].tolist() == [0, 1, 2, 0, 1]


def test_accuracy_does_not_depend_on_batches():
    torch.manual_seed(0)
    logits, labels = torch.randn(37, 7), torch.randint(0, 7, (37,))
    expected = {
        "loss": nn.functional.cross_entropy(logits.double(), labels).item(),
        "top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "top5": 100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item(),
    }
    for batch in (1, 8, 100):
        result = evaluate(Accuracy(Labelled(logits, labels)), Constant(), ALONE, batch=batch)
        assert result.scores == pytest.approx(expected, rel=1e-6) and result.samples == 37 and not result.broken
    few = evaluate(Accuracy(Labelled(logits[:, :3], labels % 3)), Constant(), ALONE)
    assert few.scores["top5"] == 100 > few.scores["top1"]


def test_views_of_a_video_count_as_one_sample_by_their_mean_probability():
    logits = torch.tensor([[[4.0, 0, 0], [0, 3, 0], [0, 3, 0]], [[0, 0, 1], [0, 0, 1], [9, 0, 0]]])
    data = Labelled(logits[:, :, :, None, None, None], torch.tensor([1, 0]))

    def answer(model, inputs):
        return model(inputs).flatten(1)

    result = evaluate(Accuracy(data, answer), Constant(), ALONE)
    mean = logits.softmax(-1).mean(1)
    assert result.samples == 2 and result.scores["top1"] == 100 * (mean.argmax(1) == data.labels).double().mean().item()
    assert result.scores["loss"] == pytest.approx(-mean[[0, 1], [1, 0]].log().mean().item(), rel=1e-5)


def test_modes_of_all_modules_come_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), Constant()))
    model[1][0].eval()  # frozen
    modes = [m.training for m in model.modules()]
    evaluate(Accuracy(Labelled(torch.zeros(4, 3), torch.zeros(4, dtype=int))), model, ALONE)
    assert [m.training for m in model.modules()] == modes


def test_better():
    judge, loss = Accuracy(None), Ranking(None)
    loss.primary, loss.higher = "loss", False
    assert judge.better({"top1": 1.0}, None) and judge.better({"top1": 1.0}, 0.5) and not judge.better({"top1": 1}, 1)
    assert loss.better({"loss": 0.5}, 1.0) and not loss.better({"loss": 2.0}, 1.0)
    assert not judge.better({"top1": float("nan")}, None)


def test_half_precision():
    with pytest.raises(InputError, match="cannot run in torch.float64; supported: float32"):
        precision(ALONE.device, torch.float64)


def _score(together: Processes, count: int) -> list:
    torch.manual_seed(0)
    logits, labels = torch.randn(count, 7), torch.randint(0, 7, (count,))
    accuracy = evaluate(Accuracy(Labelled(logits, labels)), Constant(), together, batch=4)
    ranking = evaluate(Ranking(TensorDataset(logits[:, 0], labels % 2)), Constant(), together, batch=4)
    return [accuracy.scores, accuracy.samples, ranking.scores]


def _score_together(*counts: int) -> None:
    with processes("cpu") as together:
        print(json.dumps([_score(together, count) for count in counts]))


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    """Sums and rows over processes, with unequal shares."""
    counts = (37, 2)
    _, second = in_two(tmp_path, _score_together, *counts)
    for count, (scores, samples, auroc) in zip(counts, json.loads(second.stdout), strict=True):
        alone_scores, _, alone_auroc = _score(ALONE, count)
        assert scores == pytest.approx(alone_scores, rel=1e-6) and samples == count
        assert auroc == pytest.approx(alone_auroc, nan_ok=True)
