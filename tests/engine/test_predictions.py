"""Flip averaging, restricted classes and predictions of every image against direct computations; result files."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.loaders.batch import Batch
from engine.distributed.processes import Processes
from engine.evaluate import evaluate
from engine.precision import Precision
from engine.predictions import Collector
from engine.result_files import write_json, write_table
from tests.helpers.bounds import ulps

CPU = torch.device("cpu")
ALONE = Processes(0, 1, 0, CPU, "test")
OFF = Precision("off", CPU)


class Lopsided(nn.Module):
    """Linear classifier whose logits, sums of 48 terms, depend on left and right."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(3)
        self.fc = nn.Linear(3 * 4 * 4, classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


def batches_of(classes, sizes=(6, 5)):
    torch.manual_seed(1)
    count = sum(sizes)
    images, labels = torch.randn(count, 3, 4, 4), torch.randint(classes, (count,))
    return [
        Batch(x, y, i)
        for x, y, i in zip(images.split(sizes), labels.split(sizes), torch.arange(count).split(sizes), strict=True)
    ]


def whole(batches):
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def prepare(batch):
    return batch.images, batch.labels


def test_flip_averages_the_logits_of_image_and_mirror_image():
    model, batches = Lopsided(7), batches_of(7)
    images, labels = whole(batches)
    mirrored = images[..., torch.arange(3, -1, -1)]
    logits = (model(images) + model(mirrored)) / 2
    collector = Collector(11, 7, ALONE)
    result = evaluate(model, batches, prepare, OFF, ALONE, 11, flip=True, observe=collector.observe)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=ulps(48))
    assert result.correct1 == (logits.argmax(1) == labels).sum()
    found = collector.gather()
    assert np.array_equal(found.ranked, logits.topk(5).indices)
    np.testing.assert_allclose(found.probabilities, logits.softmax(1).topk(5).values.detach(), rtol=1e-5)
    plain = evaluate(model, batches, prepare, OFF, ALONE, 11)
    assert plain.loss == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=ulps(48))
    assert abs(plain.loss - result.loss) > 1e-3


def test_restricted_answers_equal_logits_of_these_classes_alone():
    answers, model = [1, 4, 5, 8, 11, 12, 14], Lopsided(15)
    batches = [Batch(b.images, torch.tensor(answers)[b.labels], b.indices) for b in batches_of(len(answers))]
    images, labels = whole(batches)
    logits = model(images)[:, answers]  # as timm's --valid-labels
    inner = torch.tensor([answers.index(label) for label in labels.tolist()])
    collector = Collector(11, len(answers), ALONE)
    result = evaluate(model, batches, prepare, OFF, ALONE, 11, answers=answers, observe=collector.observe)
    assert result.correct1 == (logits.argmax(1) == inner).sum()
    assert result.correct5 == (logits.topk(5).indices == inner[:, None]).sum()
    assert result.loss == pytest.approx(F.cross_entropy(logits, inner).item(), rel=ulps(48))
    found = collector.gather()
    assert np.array_equal(found.ranked, np.array(answers)[logits.topk(5).indices])
    np.testing.assert_allclose(found.probabilities, logits.softmax(1).topk(5).values.detach(), rtol=1e-5)
    assert not torch.equal(model(images).argmax(1), torch.tensor(answers)[logits.argmax(1)])


@pytest.mark.parametrize(("classes", "answers", "k"), [(3, None, 3), (9, [2, 6], 2)])
def test_fewer_than_five_answers_give_shorter_lists(classes, answers, k):
    batches = batches_of(2)
    batches = [Batch(b.images, torch.tensor(answers or [0, 1])[b.labels], b.indices) for b in batches]
    collector = Collector(11, len(answers) if answers else classes, ALONE)
    result = evaluate(Lopsided(classes), batches, prepare, OFF, ALONE, 11, answers=answers, observe=collector.observe)
    assert result.top5 == 100.0
    found = collector.gather()
    assert found.ranked.shape == found.probabilities.shape == (11, k)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    assert list(found.per_image(str)) == [
        "file",
        "label",
        *(f"class{i + 1}" for i in range(k)),
        *(f"probability{i + 1}" for i in range(k)),
        "correct",
    ]


@pytest.mark.parametrize("indices", [[0, 1, 2, 2], [0, 1, 3]])
def test_image_seen_twice_or_never_is_an_error(indices):
    collector = Collector(4, 3, ALONE)
    n = len(indices)
    batch = Batch(torch.zeros(n, 3, 4, 4), torch.zeros(n, dtype=torch.long), torch.tensor(indices))
    collector.observe(batch, batch.labels, torch.zeros(n, 3), torch.zeros(n, 3, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"of 4 images were not evaluated exactly once"):
        collector.gather()


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


COLUMNS = {"file": ["a,1.jpg", 'b"2.jpg'], "label": np.array([3, 4]), "p": np.array([0.1, 0.25], dtype=np.float32)}


def test_csv_reads_back_and_leaves_no_temporary_file(tmp_path):
    write_table(tmp_path / "t.csv", COLUMNS)
    assert table(tmp_path / "t.csv") == [
        {"file": "a,1.jpg", "label": "3", "p": "0.1"},
        {"file": 'b"2.jpg', "label": "4", "p": "0.25"},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]
    (tmp_path / "t.csv").write_text("before")
    with pytest.raises(ValueError, match="shorter"):
        write_table(tmp_path / "t.csv", COLUMNS | {"short": [1]})
    assert (tmp_path / "t.csv").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"loss": math.nan, "more": [math.inf, 1.5], "name": "a\udcff"})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"loss": None, "more": [None, 1.5], "name": "a\udcff"}
