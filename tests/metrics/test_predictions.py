from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import alphaext.metrics.predictions
from alphaext import AlphaNet
from alphaext.metrics.accuracy import label_ranks
from alphaext.metrics.predictions import Predictions, predict, predict_logits
from alphaext.utils.files import read_json, write_json


def same(first: Predictions, second: Predictions) -> bool:
    """Equal to the last bit."""
    return first.num_classes == second.num_classes and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("ranks", "predicted", "labels", "confidence")
    )


def draw(samples: int, width: int, num_classes: int, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(width, num_classes)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(num_classes, width, generator=generator))
        linear.bias.copy_(torch.randn(num_classes, generator=generator))
    features = torch.randn(samples, width, generator=generator)
    return linear, features, torch.randint(num_classes, (samples,), generator=generator)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 30), st.integers(1, 8), st.integers(0, 2**16), st.integers(1, 40))
def test_logits_against_a_loop(samples: int, num_classes: int, seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (samples, num_classes), generator=generator).float()  # ties are common
    labels = torch.randint(num_classes, (samples,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alphaext.metrics.predictions, "_BLOCK_ELEMENTS", block)
        found = predict_logits(logits, labels)
    assert len(found) == samples and found.num_classes == num_classes
    assert found.confidence is not None and found.confidence.dtype == torch.float32
    for row, label, rank, predicted, confidence in zip(
        logits.tolist(), labels.tolist(), found.ranks.tolist(), found.predicted.tolist(), found.confidence.tolist(), strict=True
    ):
        order = sorted(range(num_classes), key=lambda c: (-row[c], c))
        assert (rank, predicted) == (order.index(label), order[0])
        assert confidence == pytest.approx(math.exp(max(row)) / sum(map(math.exp, row)), rel=1e-5)
    assert found.counts().tolist() == [labels.tolist().count(c) for c in range(num_classes)]
    for top_k in (1, 2, 5):
        right = [c for c, rank in zip(labels.tolist(), found.ranks.tolist(), strict=True) if rank < top_k]
        assert found.hits(top_k).tolist() == [right.count(c) for c in range(num_classes)]


def test_scores_are_those_of_the_classifier(device: str) -> None:
    linear, features, labels = draw(700, 12, 9)
    with torch.no_grad():
        logits = linear(features)
    found = predict(linear.to(device), features, labels)
    # On another device sums have another order; these draws have no near ties.
    assert torch.equal(found.ranks, label_ranks(logits, labels))
    assert torch.equal(found.predicted, logits.argmax(dim=1))
    assert found.confidence is not None
    torch.testing.assert_close(found.confidence, logits.softmax(dim=1).amax(dim=1), rtol=1e-4, atol=1e-6)
    assert all(x.device.type == "cpu" for x in (found.ranks, found.predicted, found.labels, found.confidence))


@pytest.mark.parametrize(("width", "num_classes"), [(1, 2), (33, 129), (192, 345), (2048, 50)])
def test_block_size_changes_no_bit(width: int, num_classes: int) -> None:
    linear, features, labels = draw(1100, width, num_classes)
    whole = predict(linear, features, labels)
    for rows in (1, 64, 256, 300, 512, 5000):
        assert same(predict(linear, features, labels, block_rows=rows), whole)


def test_a_block_is_all_that_is_read_and_scored() -> None:
    linear, features, labels = draw(1000, 4, 3)
    seen = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return linear(x)

    whole = predict(linear, features, labels)
    assert same(predict(Watching(), features, labels), whole)
    # Products of one size, whatever is left at the end.
    assert seen == [256] * 4
    # Blocks end where products do.
    assert same(predict(Watching(), features, labels, block_rows=300), whole)
    assert seen == [256] * 8


def test_very_many_classes_make_smaller_products(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, features, labels = draw(300, 4, 40)
    whole = predict(linear, features, labels)
    monkeypatch.setattr(alphaext.metrics.predictions, "_PRODUCT_ELEMENTS", 100)
    sizes = []
    linear.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    found = predict(linear, features, labels)
    assert sizes == [64] * 5
    assert torch.equal(found.ranks, whole.ranks)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.dtype(">f4")])
def test_memory_maps(tmp_path: Path, dtype: np.dtype) -> None:
    linear, features, labels = draw(600, 7, 5)
    np.save(tmp_path / "features.npy", features.numpy().astype(dtype))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    stored = torch.from_numpy(np.ascontiguousarray(mapped).astype(np.float32))
    assert same(predict(linear, mapped, labels), predict(linear, stored, labels))
    logits = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert torch.equal(predict_logits(logits, labels % 5).ranks, label_ranks(stored, labels % 5))


def test_strided_features_and_numpy_labels() -> None:
    linear, features, labels = draw(300, 7, 5)
    wide = torch.randn(300, 14)
    wide[:, ::2] = features
    assert same(predict(linear, wide[:, ::2], labels.numpy().astype(np.int32)), predict(linear, features, labels))
    assert same(predict(linear, features.numpy()[::-1], labels.flip(0)), predict(linear, features.flip(0), labels.flip(0)))


@pytest.mark.parametrize("rule", ["clamp", "softmax", "l1"])
def test_a_head_says_what_its_folded_linear_says(rule: str) -> None:
    linear, features, labels = draw(500, 16, 12)
    head = AlphaNet.from_linear(
        linear, class_counts=[90] * 8 + [5] * 4, class_means=torch.randn(12, 16), top_k=3, rule=rule, init="default", seed=0
    )
    found, folded = predict(head, features, labels), predict(head.fold(), features, labels)
    assert torch.equal(found.ranks, folded.ranks) and torch.equal(found.predicted, folded.predicted)
    assert not torch.equal(found.ranks, predict(linear, features, labels).ranks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_classifier_gives_the_dtype(dtype: torch.dtype) -> None:
    linear, features, labels = draw(300, 8, 6)
    linear = linear.to(dtype)
    with torch.no_grad():
        logits = linear(features.to(dtype))
    found = predict(linear, features, labels)
    # Rounding may differ between products of 256 and of 300 rows, but not by much.
    assert (found.ranks == label_ranks(logits, labels)).float().mean() > 0.98
    assert same(predict(linear, features.double(), labels), found)


def test_modules_of_other_kinds() -> None:
    linear, features, labels = draw(300, 6, 5)
    whole = predict(linear, features, labels)
    dropout = nn.Sequential(nn.Dropout(0.9), linear)
    assert same(predict(dropout, features, labels), whole)
    with torch.no_grad():
        logits = linear(features)
    assert torch.equal(predict(nn.Identity(), logits.double(), labels).ranks, label_ranks(logits, labels))


def test_the_classifier_is_left_as_it_was() -> None:
    linear, features, labels = draw(10, 6, 5)
    model = nn.Sequential(nn.Dropout(0.5).eval(), nn.BatchNorm1d(6), linear)
    mean = model[1].running_mean.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predict(model, features, labels)
    assert [m.training for m in model] == [False, True, True] and model.training
    assert torch.equal(model[1].running_mean, mean)
    with pytest.raises(ValueError, match="nan"):
        predict(model, features.index_fill(0, torch.tensor([3]), torch.nan), labels)
    assert [m.training for m in model] == [False, True, True]


def test_no_autocast_and_no_gradient() -> None:
    linear, features, labels = draw(300, 64, 50)
    whole = predict(linear, features, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(predict(linear, features.requires_grad_(), labels), whole)


def test_another_default_device_changes_nothing() -> None:
    linear, features, labels = draw(300, 6, 5)
    whole = predict(linear, features, labels)
    with torch.device("meta"):
        assert same(predict(linear, features, labels), whole)
        assert same(predict(linear, features.numpy(), labels.tolist()), whole)
        assert same(Predictions.from_dict(whole.to_dict()), whole)


def test_elsewhere_a_copy_is_used(device: str) -> None:
    linear, features, labels = draw(300, 6, 5)
    found = predict(linear, features, labels, device=device)
    assert linear.weight.device.type == "cpu"
    assert torch.equal(found.ranks, predict(linear, features, labels).ranks)


def test_a_progress_bar_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    linear, features, labels = draw(300, 6, 5)
    predict(linear, features, labels)
    assert capsys.readouterr() == ("", "")
    predict(linear, features, labels, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "300 of 300" in shown.err


def test_infinite_scores() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, inf], [inf, 1.0, inf], [-inf, -inf, -inf], [0.0, -inf, 0.0]])
    found = predict_logits(logits, [2, 2, 1, 0])
    assert found.predicted.tolist() == [2, 0, 0, 0]
    assert found.ranks.tolist() == [0, 1, 1, 0]
    assert found.confidence is not None
    torch.testing.assert_close(found.confidence, torch.tensor([1.0, 0.5, 1 / 3, 0.5]))


def test_nan_is_told_with_its_sample() -> None:
    logits = torch.zeros(5, 3)
    logits[3, 1] = math.nan
    with pytest.raises(ValueError, match="logits must give no NaN, got nan for sample 3, class 1"):
        predict_logits(logits, [0] * 5)
    linear, features, labels = draw(600, 4, 3)
    features[513] = 10.0
    # Not by numbers that overflow: a fused multiply and add rounds once, and infinity less a finite product is no NaN.
    spoils = torch.tensor([False, False, True])
    linear.register_forward_hook(lambda _, rows, scores: scores.masked_fill((rows[0][:, :1] == 10) & spoils, math.nan))
    with pytest.raises(ValueError, match="classifier must give no NaN, got nan for sample 513, class 2"):
        predict(linear, features, labels)


def test_labels_are_checked_before_the_rest_is_scored() -> None:
    linear, features, labels = draw(600, 4, 3)
    labels[500] = 3
    sizes = []
    linear.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2, got 3 at index 500"):
        predict(linear, features, labels)
    assert sizes == []
    # How many classes there are shows in the first scores only.
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2, got 3 at index 500"):
        predict(nn.Sequential(linear), features, labels)
    assert sizes == [256]


def test_features_that_are_not_finite() -> None:
    linear, features, labels = draw(600, 4, 3)
    features[300, 2] = math.inf
    with pytest.raises(ValueError, match=r"features must be finite, got inf at index \[300, 2\]"):
        predict(linear, features, labels, block_rows=256)


class Returning(nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> object:
        return self.result(x) if callable(self.result) else self.result


LINEAR = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("classifier", "features", "labels", "options", "error", "message"),
    [
        (torch.ones(3, 4), torch.zeros(2, 4), [0, 1], {}, TypeError, "classifier must be Module, got Tensor"),
        (LINEAR, torch.zeros(2, 5), [0, 1], {}, ValueError, r"features must have shape [n, 4] for this classifier, got [2, 5]"),
        (
            nn.Sequential(LINEAR),
            torch.zeros(2, 5),
            [0, 1],
            {},
            ValueError,
            "cannot score features of shape [256, 5]",
        ),
        (LINEAR, torch.zeros(4), [0], {}, ValueError, "features must have shape [n, D], got [4]"),
        (LINEAR, torch.zeros(2, 4).long(), [0, 1], {}, TypeError, "features must be floating point, got torch.int64"),
        (LINEAR, "features.npy", [0, 1], {}, TypeError, "features must be a tensor, a NumPy array or a list"),
        (LINEAR, torch.zeros(0, 4), [], {}, ValueError, "features must not be empty"),
        (LINEAR, torch.zeros(2, 4), [0], {}, ValueError, "features and labels must have one entry a sample, got 2 and 1"),
        (LINEAR, torch.zeros(2, 4), [0, 3], {}, ValueError, "labels must be in 0..2, got 3 at index 1"),
        (nn.Sequential(LINEAR), torch.zeros(2, 4), [0, 3], {}, ValueError, "labels must be in 0..2, got 3 at index 1"),
        (LINEAR, torch.zeros(2, 4), [0.0, 1.0], {}, TypeError, "labels must be integers"),
        (LINEAR, torch.zeros(2, 4), [0, 1], {"block_rows": 0}, ValueError, "block_rows must be at least 1, got 0"),
        (LINEAR, torch.zeros(2, 4), [0, 1], {"block_rows": 1.5}, TypeError, "block_rows must be an integer"),
        (LINEAR, torch.zeros(2, 4), [0, 1], {"device": "nowhere"}, ValueError, 'device must be "cpu"'),
        (LINEAR, torch.zeros(2, 4), [0, 1], {"device": "meta"}, ValueError, 'device must be "cpu"'),
        (Returning((1, 2)), torch.zeros(2, 4), [0, 1], {}, TypeError, "classifier must return a tensor of scores, got tuple"),
        (
            Returning(lambda x: x.sum(1)),
            torch.zeros(2, 4),
            [0, 1],
            {},
            ValueError,
            "must have shape [256, N], got [256]",
        ),
        (Returning(lambda x: x.long()), torch.zeros(2, 4), [0, 1], {}, TypeError, "scores must be floating point"),
        (Returning(lambda x: x[:, :0]), torch.zeros(2, 4), [0, 1], {}, ValueError, "scores must have at least one column"),
        (Returning(lambda x: x[:2]), torch.zeros(2, 4), [0, 1], {}, ValueError, "scores must have shape [256, N], got [2, 4]"),
    ],
)
def test_predict_refuses(
    classifier: object, features: object, labels: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        predict(classifier, features, labels, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(2, 3), [0, 3], ValueError, r"labels must be in 0\.\.2, got 3 at index 1"),
        (torch.zeros(2, 3), [0], ValueError, "logits and labels must have one entry a sample, got 2 and 1"),
        (torch.zeros(3), [0], ValueError, r"logits must have shape \[n, N\], got \[3\]"),
        (torch.zeros(2, 0), [0, 1], ValueError, r"logits must have at least one column, got \[2, 0\]"),
        (torch.zeros(2, 3).long(), [0, 1], TypeError, "logits must be floating point"),
    ],
)
def test_predict_logits_refuses(logits: Tensor, labels: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict_logits(logits, labels)


def test_there_and_back_through_a_file(tmp_path: Path) -> None:
    predictions = predict(*draw(300, 6, 5))
    write_json(tmp_path / "predictions.json", predictions.to_dict())
    assert same(Predictions.from_dict(read_json(tmp_path / "predictions.json", "predictions")), predictions)
    plain = Predictions(predictions.ranks, predictions.predicted, predictions.labels, 5)
    assert Predictions.from_dict(plain.to_dict()).confidence is None
    assert len(Predictions.from_dict(Predictions([], [], [], 3, []).to_dict())) == 0


GOOD = {"ranks": [0, 1], "predicted": [1, 1], "labels": [1, 0], "num_classes": 2}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ranks": [0, 2]}, ValueError, r"ranks must be in 0\.\.1, got 2 at index 1"),
        ({"labels": [1, -1]}, ValueError, r"labels must be in 0\.\.1, got -1 at index 1"),
        ({"predicted": [1, 5]}, ValueError, r"predicted must be in 0\.\.1, got 5 at index 1"),
        ({"predicted": [1]}, ValueError, "predicted and labels must have one entry a sample, got 1 and 2"),
        ({"ranks": [0, 0]}, ValueError, "got rank 0, predicted 1, label 0 at index 1"),
        ({"ranks": [1, 1]}, ValueError, "got rank 1, predicted 1, label 1 at index 0"),
        ({"ranks": [0.0, 1.0]}, TypeError, "ranks must be integers"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"confidence": [0.5]}, ValueError, r"confidence must have shape \[2\], got \[1\]"),
        ({"confidence": [0.5, 1.5]}, ValueError, r"confidence must be in \[0, 1\], got 1.5 at index 1"),
        ({"confidence": [0.5, math.nan]}, ValueError, r"confidence must be in \[0, 1\], got nan at index 1"),
        ({"confidence": [1, 1]}, TypeError, "confidence must be floating point"),
    ],
)
def test_predictions_by_hand_are_checked(changed: dict[str, object], error: type[Exception], message: str) -> None:
    assert Predictions(**GOOD).hits().tolist() == [0, 1]  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        Predictions(**GOOD | changed)  # type: ignore[arg-type]


def test_from_dict_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="got no predicted, labels"):
        Predictions.from_dict({"ranks": [0], "num_classes": 2})
    with pytest.raises(TypeError, match="entries must be Mapping, got list"):
        Predictions.from_dict([0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        Predictions(**GOOD).hits(0)  # type: ignore[arg-type]
