"""Tau-normalisation, logit adjustment and a constant on few logits: the layers, and their choice on validation features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphaext.baselines.post_hoc import TAUS, choose_logit_adjustment, choose_tau, logit_adjusted, tau_normalized
from alphaext.classes import ClassSplit, split_classes
from alphaext.metrics import split_accuracy
from alphaext.training.few_bias import choose_few_bias, few_bias

COUNTS = torch.tensor([300, 200, 90, 50, 12, 6])
SPLIT = split_classes(COUNTS)


def make_linear(seed: int = 0, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A classifier whose rows are shorter and whose biases are lower the fewer samples a class has."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(8, 6, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(6, 8, generator=generator) * torch.tensor([3.0, 2.5, 2.0, 1.5, 0.8, 0.5])[:, None])
        if bias:
            linear.bias.copy_(torch.tensor([1.0, 0.8, 0.5, 0.0, -1.0, -1.5]))
    return linear


def make_validation(linear: nn.Linear, seed: int = 1, samples: int = 120) -> tuple[Tensor, Tensor]:
    """Features that lie near the row of their class, to various degrees."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 6
    directions = nn.functional.normalize(linear.weight.detach().float(), dim=1)
    return 2 * directions[labels] + 0.8 * torch.randn(samples, 8, generator=generator), labels


def accuracy_of(linear: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, float]:
    logits = nn.functional.linear(features, linear.weight, linear.bias)
    return split_accuracy(logits.detach(), labels, SPLIT)


# the layers


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 3), st.booleans(), st.booleans(), st.integers(0, 100))
def test_tau_is_a_power_of_the_rows_length(tau: float, bias: bool, keep: bool, seed: int) -> None:
    linear = make_linear(seed, bias, torch.float64)
    made = tau_normalized(linear, tau, keep_bias=keep)
    rows = [row / row.norm() ** tau for row in linear.weight.detach()]
    torch.testing.assert_close(made.weight.detach(), torch.stack(rows), rtol=1e-12, atol=0)
    assert (made.bias is None) == (not (bias and keep))
    assert made.bias is None or made.bias.equal(linear.bias)


def test_tau_zero_changes_no_bit_and_one_makes_rows_equally_long():
    linear = make_linear()
    assert tau_normalized(linear, 0).weight.equal(linear.weight)
    torch.testing.assert_close(tau_normalized(linear, 1).weight.norm(dim=1).detach(), torch.ones(6))


@pytest.mark.parametrize("bias", [True, False])
def test_logit_adjustment_is_the_log_of_the_prior(bias):
    linear = make_linear(bias=bias, dtype=torch.float64)
    made = logit_adjusted(linear, COUNTS.tolist(), tau=1.5)
    features = torch.randn(9, 8, dtype=torch.float64)
    wanted = linear(features) - 1.5 * torch.log(COUNTS.double() / COUNTS.sum())
    torch.testing.assert_close(made(features), wanted, rtol=1e-12, atol=1e-12)
    assert made.weight.equal(linear.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_few_bias_moves_few_logits_alone(bias):
    linear = make_linear(bias=bias)
    made = few_bias(linear, [5, 4], 0.75)
    old = linear.bias.detach() if bias else torch.zeros(6)
    assert made.weight.equal(linear.weight) and made.bias[:4].equal(old[:4]) and made.bias[4:].equal(old[4:] + 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_layers_keep_dtype_device_and_the_original(dtype, device):
    linear = make_linear(dtype=dtype).to(device)
    before = [p.clone() for p in linear.parameters()]
    state = torch.random.get_rng_state()
    for made in (tau_normalized(linear, 0.7, keep_bias=True), logit_adjusted(linear, COUNTS), few_bias(linear, [5], 1)):
        assert type(made) is nn.Linear and made.weight.dtype == made.bias.dtype == dtype
        assert made.weight.device.type == made.bias.device.type == device
        assert made.weight.requires_grad and made.weight.data_ptr() != linear.weight.data_ptr()
    assert all(p.equal(old) for p, old in zip(linear.parameters(), before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def zero_row() -> nn.Linear:
    linear = make_linear()
    linear.weight.data[[2, 4]] = 0
    return linear


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tau_normalized(zero_row(), 0.5), ValueError, "no row of zeros.* class 2, 4$"),
        (lambda: tau_normalized(make_linear(), -0.1), ValueError, "tau must be finite and at least 0, got -0.1"),
        (lambda: tau_normalized(make_linear(), True), TypeError, "tau must be a number"),
        (lambda: tau_normalized(nn.ReLU(), 0.5), TypeError, "linear must have a weight"),
        (lambda: logit_adjusted(make_linear(), [3, 0, 1, 1, 1, 0]), ValueError, "at least 1 for every class.* class 1, 5$"),
        (lambda: logit_adjusted(make_linear(), [1] * 5), ValueError, r"class_counts must have shape \[6\], got \[5\]"),
        (lambda: logit_adjusted(make_linear(), [0.5] * 6), TypeError, "class_counts must be integers"),
        (lambda: few_bias(make_linear(), [6], 0.1), ValueError, r"few_classes must be in 0\.\.5, got 6"),
        (lambda: few_bias(make_linear(), [1, 1], 0.1), ValueError, "few_classes must name each class once"),
        (lambda: few_bias(make_linear(), [1], float("nan")), ValueError, "offset must be finite, got nan"),
        (lambda: few_bias(make_linear(), [1], "0.5"), TypeError, "offset must be a number, finite, got '0.5'"),
    ],
)
def test_layers_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


# the choices


@pytest.mark.parametrize("keep_bias", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("select", "min_all"), [(None, None), ("best_few", None), ("best_few", 0.3)])
def test_tau_chosen_is_the_best_of_all_layers(keep_bias, bias, select, min_all):
    linear = make_linear(bias=bias)
    features, labels = make_validation(linear)
    result = choose_tau(linear, features, labels, SPLIT, keep_bias=keep_bias, select=select, min_all=min_all)
    layers = [tau_normalized(linear, tau, keep_bias=keep_bias) for tau in TAUS]
    accuracies = [accuracy_of(layer, features, labels) for layer in layers]
    assert [row["tau"] for row in result.table] == list(TAUS)
    assert [{name: row[name] for name in accuracies[0]} for row in result.table] == accuracies
    original = accuracy_of(linear, features, labels)
    assert result.original == original
    if select is None:
        wanted = max(range(21), key=lambda index: (accuracies[index]["all"], -index))
    else:
        bound = original["all"] if min_all is None else min_all
        allowed = [index for index in range(21) if accuracies[index]["all"] >= bound]
        wanted = max(allowed, key=lambda index: (accuracies[index]["few"], -index))
    assert result.chosen == {"tau": TAUS[wanted]} and wanted > 0
    assert result.linear.weight.equal(layers[wanted].weight)
    assert result.accuracy == accuracies[wanted]
    assert result.settings == {"keep_bias": keep_bias} and result.seconds > 0


def test_logit_adjustment_chosen_is_the_best_of_all_layers():
    linear = make_linear()
    features, labels = make_validation(linear)
    result = choose_logit_adjustment(linear, COUNTS, features, labels, taus=[1.2, 0, 0.4])
    layers = {tau: logit_adjusted(linear, COUNTS, tau) for tau in (0.0, 0.4, 1.2)}
    accuracies = {tau: accuracy_of(layer, features, labels) for tau, layer in layers.items()}
    assert [row["tau"] for row in result.table] == [0.0, 0.4, 1.2]
    assert all(accuracies[row["tau"]] == {name: row[name] for name in ("few", "medium", "many", "all")} for row in result.table)
    tau = max(accuracies, key=lambda tau: (accuracies[tau]["all"], -tau))
    assert result.chosen == {"tau": tau} and result.linear.bias.equal(layers[tau].bias) and tau > 0
    assert accuracies[0.0] == result.original and result.name == "logit-adjustment"


def test_of_equally_good_taus_the_smallest_is_taken():
    linear = make_linear(bias=False)
    nn.init.eye_(linear.weight)  # rows equally long: no tau changes anything
    result = choose_tau(linear, torch.eye(8)[:6].repeat(5, 1), torch.arange(6).repeat(5), SPLIT, taus=[2.0, 0.5, 1.0])
    assert result.chosen == {"tau": 0.5}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.integers(2, 80), st.integers(1, 60))
def test_few_bias_chosen_is_the_best_of_all_constants(seed: int, grid: bool, few: bool, samples: int, block: int) -> None:
    """Against every offset that could matter, each tried with its layer; on a grid, ties of scores are common."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, 6, generator=generator)
    if grid:
        logits = (logits * 2).round()
    labels = torch.randint(6, (samples,), generator=generator)
    labels[:2] = torch.tensor([5, 1])  # a sample of either side
    linear = nn.Linear(6, 6, bias=False)
    nn.init.eye_(linear.weight)
    split = ClassSplit(few=[0, 5], medium=[1, 2], many=[3, 4])
    select = "best_few" if few else "best_all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alphaext.training.few_bias._TABLE_ROWS", 10**6)
        patch.setattr("alphaext.training.selection._BLOCK_ELEMENTS", block)
        patch.setattr("alphaext.training.selection.unfit_to_choose", lambda *_: "")
        result = choose_few_bias(linear, logits, labels, split, select=select)

    def moved(offset: float) -> dict[str, float]:
        return split_accuracy(few_bias(linear, [0, 5], offset)(logits).detach(), labels, split)

    for row in result.table:
        assert str(moved(row["offset"])) == str({name: row[name] for name in ("few", "medium", "many", "all")})
    original = moved(0.0)
    assert str(result.original) == str(original)
    gaps = logits[:, 1:5].amax(1).double() - logits[:, [0, 5]].amax(1).double()
    edges = gaps.unique()
    everywhere = torch.cat([edges[:1] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1:] + 1, torch.zeros(1)]).tolist()
    if few:
        best = max(row["few"] for row in map(moved, everywhere) if row["all"] >= original["all"])
        assert result.accuracy["few"] == best
        assert result.accuracy["all"] >= original["all"]
    else:
        assert result.accuracy["all"] == max(row["all"] for row in map(moved, everywhere))
    # No nearer one is as good.
    nearer = [row for row in result.table if abs(row["offset"]) < abs(result.chosen["offset"])]
    if few:
        assert not any(row["few"] == best and row["all"] >= original["all"] for row in nearer)
    else:
        assert all(row["all"] < result.accuracy["all"] for row in nearer)


def test_few_bias_moves_the_right_way_and_shows_a_short_table():
    linear = make_linear()
    features, labels = make_validation(linear, samples=600)
    result = choose_few_bias(linear, features, labels, SPLIT, select="best_few")
    assert result.chosen["offset"] > 0 and result.accuracy["few"] > result.original["few"]
    assert result.accuracy["all"] >= result.original["all"] == accuracy_of(linear, features, labels)["all"]
    assert result.accuracy == accuracy_of(result.linear, features, labels)
    assert result.settings["candidates"] > 41 and 41 <= len(result.table) <= 43
    offsets = [row["offset"] for row in result.table]
    assert offsets == sorted(offsets) and 0.0 in offsets and result.chosen["offset"] in offsets
    assert result.table[0]["few"] == 0 and result.table[-1]["medium"] == result.table[-1]["many"] == 0


def test_few_bias_from_given_offsets():
    linear = make_linear()
    features, labels = make_validation(linear)
    offsets = [2.0, -1.0, 0.0, 1.0]
    result = choose_few_bias(linear, features, labels, SPLIT, offsets=offsets)
    accuracies = {offset: accuracy_of(few_bias(linear, SPLIT.few, offset), features, labels) for offset in sorted(offsets)}
    assert [row["offset"] for row in result.table] == sorted(offsets)
    assert [row["all"] for row in result.table] == [own["all"] for own in accuracies.values()]
    assert result.chosen["offset"] == max(accuracies, key=lambda offset: (accuracies[offset]["all"], -abs(offset)))


def test_where_no_offset_matters_none_is_taken():
    linear = make_linear(bias=False)
    nn.init.zeros_(linear.weight)
    result = choose_few_bias(linear, torch.ones(30, 8), [1, 2, 5] * 10, SPLIT)
    assert result.chosen == {"offset": 0.0} and len(result.table) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_half_precision_memory_map_and_classifiers_of_any_dtype(dtype, tmp_path: Path, monkeypatch):
    linear = make_linear(dtype=dtype)
    features, labels = make_validation(linear)
    features.half().numpy().tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", mode="r", dtype=np.float16, shape=(120, 8))
    monkeypatch.setattr("alphaext.training.selection._BLOCK_ELEMENTS", 50)
    wide = nn.Linear(8, 6, dtype=torch.promote_types(dtype, torch.float32))
    wide.load_state_dict(linear.state_dict())
    values = features.half().to(wide.weight.dtype)
    result, expected = choose_tau(linear, mapped, labels.numpy(), SPLIT), choose_tau(wide, values, labels, SPLIT)
    assert result.table == expected.table and result.linear.weight.dtype == dtype
    result = choose_few_bias(linear, mapped, labels.numpy(), SPLIT)
    assert result.linear.weight.dtype == dtype and result.accuracy["all"] > result.original["all"]
    # The offset leaves room for its rounding to the classifier's dtype.
    assert result.accuracy == accuracy_of(result.linear.to(wide.weight.dtype), values, labels)


def test_the_offset_leaves_room_for_its_rounding():
    """Gaps a thousandth apart: near 8, float16 has nothing between them, so no offset there is any."""
    linear = nn.Linear(2, 2, bias=False, dtype=torch.float16)
    nn.init.eye_(linear.weight)
    features = torch.zeros(40, 2)
    features[:, 0] = 8.001 + torch.arange(40) * 1e-3
    labels = (torch.arange(40) < 20).long()  # best separated at 8.0205
    split = ClassSplit(few=[1], medium=[], many=[0])
    result = choose_few_bias(linear, features, labels, split)
    logits = nn.functional.linear(features, linear.weight.float().detach(), result.linear.bias.float().detach())
    assert str(result.accuracy) == str(split_accuracy(logits, labels, split))
    assert choose_few_bias(linear.float(), features, labels, split).chosen["offset"] == pytest.approx(8.0205, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(taus=[]), ValueError, "taus is empty"),
        (dict(taus=0.5), TypeError, "taus must be a list of numbers, got 0.5"),
        (dict(taus=[0.5, -1]), ValueError, "taus must be finite and at least 0, got -1"),
        (dict(taus=["0.5"]), TypeError, "taus must be a number"),
        (dict(select="last"), ValueError, "select must be one of best_all, best_few, got 'last'"),
        (dict(min_all=0.5), ValueError, "min_all must be a fraction"),
        (dict(select="best_few", val_labels=torch.arange(12) % 4), ValueError, "val_labels has no sample of a few class"),
        (dict(split=[1]), TypeError, "split must be ClassSplit"),
        (dict(val_features=torch.ones(12, 7)), ValueError, r"val_features must have shape \[n, 8\]"),
    ],
)
def test_choices_refuse(call, error, message):
    arguments = {"val_features": torch.ones(12, 8), "val_labels": torch.arange(12) % 6, "split": SPLIT, **call}
    with pytest.raises(error, match=message):
        choose_tau(make_linear(), **arguments)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (lambda labels: labels < 4, "0 of few classes"),
        (lambda labels: labels > 3, "0 of base classes"),
        (lambda labels: torch.arange(120) < 24, "8 of few classes"),
        (lambda labels: (labels > 3) | (labels == 1), "show 1 of 4 base classes"),
    ],
)
def test_samples_that_show_too_little_choose_no_number(kept, reason):
    linear = make_linear()
    features, labels = make_validation(linear)
    part = features[kept(labels)], labels[kept(labels)], SPLIT
    with pytest.raises(ValueError, match=f"fit to choose tau by, but the validation samples .*{reason}.*; give tau itself"):
        choose_tau(linear, *part)
    with pytest.raises(ValueError, match=f"fit to choose tau by, but the validation samples .*{reason}"):
        choose_logit_adjustment(linear, COUNTS, *part[:2])
    with pytest.raises(ValueError, match=f"fit to choose offset by, but the validation samples .*{reason}"):
        choose_few_bias(linear, *part)


def test_few_bias_refuses_splits_and_offsets():
    linear, data = make_linear(), (torch.ones(6, 8), torch.arange(6))
    for split, name in ((ClassSplit(few=[], medium=range(6), many=[]), "few"), (ClassSplit(list(range(6)), [], []), "base")):
        with pytest.raises(ValueError, match=f"split must have a {name} class"):
            choose_few_bias(linear, *data, ClassSplit(list(split.few), list(split.medium), []))
    for offsets, error, message in (
        ([], ValueError, "offsets is empty"),
        ([float("inf")], ValueError, "offsets must be finite, got inf"),
        ("1", TypeError, "offsets must be a list of numbers"),
    ):
        with pytest.raises(error, match=message):
            choose_few_bias(linear, *data, SPLIT, offsets=offsets)
    broken = torch.ones(6, 8)
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"val_features must be finite, got nan at index \[3, 2\]"):
        choose_few_bias(linear, broken, torch.arange(6), SPLIT)
