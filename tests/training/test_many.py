"""Many trainings at once: each gives what it gives alone, and none harms another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_single import interrupt, make_data
from torch import nn

from alphaext import AlphaNet, class_means, fit, fit_many
from alphaext.training import cached_logits, preset_options, single
from alphaext.training import many as sweep
from alphaext.training import native_engine as engines

FEATURES, LABELS = make_data(per_base=30)
VALIDATION = dict(zip(("val_features", "val_labels"), make_data(seed=5), strict=True))
HEAD_OPTIONS = {
    "gamma",
    "top_k",
    "shared",
    "rule",
    "pool",
    "pca_dim",
    "init",
    "projected_gradient",
    "metric",
    "neighbor_seed",
}


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(12, 8)


def alone(linear: nn.Linear, config: dict):
    head_options = {name: value for name, value in config.items() if name in HEAD_OPTIONS}
    options = {name: value for name, value in config.items() if name not in HEAD_OPTIONS}
    head = AlphaNet.from_linear(
        linear,
        class_counts=torch.bincount(LABELS),
        class_means=class_means(FEATURES, LABELS),
        seed=config.get("seed", 0),
        **head_options,
    )
    return head, fit(head, FEATURES, LABELS, **VALIDATION, **options)


CONFIGS = [
    dict(gamma=0.5, seed=1, epochs=4),
    dict(gamma=0.9, rule="softmax", epochs=3, lr=0.03, top_k=3),
    dict(rule="l1", pool="all", epochs=4, negative_ratio=0.5),
    dict(shared=True, epochs=2, negative_sampling="class_balanced", momentum=0.5, weight_decay=1e-3),
    dict(pca_dim=4, init="default", projected_gradient=True, epochs=3, batch_size=7, select="last"),
]


@pytest.mark.parametrize("cache_bytes", [cached_logits.CACHE_BYTES, 0], ids=["all logits kept", "logits of an epoch kept"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_each_gives_the_bits_it_gives_alone(linear, jobs, cache_bytes, monkeypatch):
    monkeypatch.setattr(cached_logits, "CACHE_BYTES", cache_bytes)
    runs = fit_many(linear, FEATURES, LABELS, CONFIGS, jobs=jobs, **VALIDATION)
    assert [run.config for run in runs] == CONFIGS
    for run, config in zip(runs, CONFIGS, strict=True):
        head, result = alone(linear, config)
        assert run.error == "" and run.result.engine == "native"
        for name, value in head.state_dict().items():
            assert value.equal(run.head.state_dict()[name]), name
        assert str(run.result.history) == str(result.history)
        assert run.result.selected_epoch == result.selected_epoch


@pytest.mark.parametrize("interrupted", [False, True])
def test_side_by_side_is_each_alone(linear, monkeypatch, tmp_path, interrupted):
    """What a GPU does, an epoch of all trainings in one call, on the CPU's kernels: the bits of each alone."""

    def side_by_side(trainings, workers, advance):
        heads, samplers = [t.run.head for t in trainings], [t.run.data.sampler for t in trainings]
        epochs = range(1, max(t.run.options.epochs for t in trainings) + 1)
        logits = engines.SharedLogits(heads, trainings[0].run.data, epochs, samplers)
        return sweep._train_side_by_side(trainings, logits, advance)

    configs = [*CONFIGS, *({**config, "gamma": 0.8, "seed": 3} for config in CONFIGS), dict(lr=1e30, init="default", epochs=3)]
    expected = fit_many(linear, FEATURES, LABELS, configs, **VALIDATION)
    monkeypatch.setattr(sweep, "_train_all", side_by_side)
    if interrupted:
        fit_many(linear, FEATURES, LABELS, configs[:3], checkpoint=tmp_path, **VALIDATION)
    runs = fit_many(linear, FEATURES, LABELS, configs, checkpoint=tmp_path if interrupted else None, **VALIDATION)
    for run, alone in zip(runs, expected, strict=True):
        assert run.error == alone.error
        if not run.error:
            assert all(value.equal(run.head.state_dict()[name]) for name, value in alone.head.state_dict().items())
            assert str(run.result.history) == str(alone.result.history)


def test_heads_share_one_classifier(linear):
    one, two = fit_many(linear, FEATURES, LABELS, [dict(epochs=1), dict(epochs=1, gamma=0.5)])
    assert one.head.weight.data_ptr() == two.head.weight.data_ptr() != linear.weight.data_ptr()
    one.head.double()
    assert two.head.weight.dtype == torch.float32


def test_one_that_diverges_stops_no_other(linear):
    runs = fit_many(linear, FEATURES, LABELS, [dict(lr=1e30, init="default"), dict(epochs=2)])
    assert runs[0].head is None and runs[0].result is None
    assert "in epoch 1 (lr 1e+30)" in runs[0].error
    assert runs[1].error == "" and len(runs[1].result.history) == 3


def test_interrupted_and_gone_on(linear, tmp_path, monkeypatch):
    expected = fit_many(linear, FEATURES, LABELS, CONFIGS, **VALIDATION)
    original, calls = engines.NativeEngine.train, []

    def train(self, *arguments):
        calls.append(1)
        return interrupt() if len(calls) == 9 else original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engines.NativeEngine, "train", train)
        patch.setattr(single, "_SECONDS_BETWEEN_CHECKPOINTS", math.inf)  # on a busy machine the third would be kept as well
        fit_many(linear, FEATURES, LABELS, CONFIGS, checkpoint=tmp_path, jobs=1, **VALIDATION)
    assert len(list(tmp_path.glob("*.pt"))) == 2  # of those that were finished
    calls.clear()
    monkeypatch.setattr(engines.NativeEngine, "train", lambda *arguments: calls.append(1) or original(*arguments))
    runs = fit_many(linear, FEATURES, LABELS, CONFIGS, checkpoint=tmp_path, **VALIDATION)
    assert len(calls) == sum(config["epochs"] for config in CONFIGS[2:])
    for run, whole in zip(runs, expected, strict=True):
        assert run.head.w2.equal(whole.head.w2) and str(run.result.history) == str(whole.result.history)


def test_nothing_to_do(linear):
    assert fit_many(linear, FEATURES, LABELS, []) == []


BAD = {
    r"configs\[1\]: gamma must be finite and above 0 and at most 1, got 2": dict(configs=[dict(), dict(gamma=2.0)]),
    r"configs\[0\]: unknown option 'gama'": dict(configs=[dict(gama=0.5)]),
    r"configs\[0\]: pool must be one of base, many, all, got 'some'": dict(configs=[dict(pool="some")]),
    r"configs\[0\]: metric must be one of euclidean, cosine, random, got 'near'": dict(configs=[dict(metric="near")]),
    r"configs\[0\]: neighbor_seed must be at least 0, got -1": dict(configs=[dict(metric="random", neighbor_seed=-1)]),
    r"configs\[0\]: top_k must be at most": dict(configs=[dict(top_k=7)]),
    r"configs\[0\]: select='best_few' needs val_features": dict(configs=[dict(select="best_few")]),
    "labels has no few class: the smallest has 6 samples, few are those below 3": dict(few_below=3),
    "jobs must be at least 1, got 0": dict(jobs=0),
    "val_features and val_labels must be given together": dict(val_features=FEATURES),
    "checkpoint must be a directory, got the file": dict(checkpoint=__file__),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls(linear, message):
    arguments = {"configs": [dict(epochs=1)], **BAD[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        fit_many(linear, FEATURES, LABELS, **arguments)


def test_half_precision_is_refused(linear):
    with pytest.raises(ValueError, match="native engine cannot train this: the head is torch.float16"):
        fit_many(linear.half(), FEATURES, LABELS, [dict(epochs=1)])


def test_cores():
    assert sweep._cores() >= 1


def test_numpy_numbers_leave_readable_checkpoints(linear, tmp_path):
    configs = [dict(epochs=np.int64(2), seed=seed, lr=np.float64(0.1), batch_size=np.int32(16)) for seed in np.arange(2)]
    first = fit_many(linear, FEATURES, LABELS, configs, checkpoint=tmp_path)
    again = fit_many(linear, FEATURES, LABELS, configs, checkpoint=tmp_path)
    assert [run.error for run in (*first, *again)] == [""] * 4
    assert first[1].head.w2.equal(again[1].head.w2)


def test_configurations_that_resemble_each_other_keep_apart(linear, tmp_path):
    configs = [dict(epochs=3), dict(epochs=3, seed=0), dict(epochs=5), dict(epochs=5, lr_schedule="cosine")]
    for _ in range(2):
        runs = fit_many(linear, FEATURES, LABELS, configs, checkpoint=tmp_path, jobs=3)
        assert [len(run.result.history) for run in runs] == [4, 4, 6, 6]
    assert len(list(tmp_path.iterdir())) == 4


NEIGHBORS = [dict(metric="cosine"), dict(metric="random"), dict(metric="random", neighbor_seed=1)]


def test_neighbour_options_are_those_of_from_linear(linear):
    configs = [dict(epochs=2, top_k=3, **config) for config in [{}, *NEIGHBORS]]
    runs = fit_many(linear, FEATURES, LABELS, configs, **VALIDATION)
    for run, config in zip(runs, configs, strict=True):
        head, _ = alone(linear, config)
        assert run.head.members.equal(head.members) and run.head.w2.equal(head.w2)
    assert len({str(run.head.members.tolist()) for run in runs[1:]}) == 3


def test_checkpoints_tell_neighbours_apart(linear, tmp_path):
    first = fit_many(linear, FEATURES, LABELS, [dict(epochs=1)], checkpoint=tmp_path)
    # What changes nothing makes no other name.
    spelled_out = dict(epochs=1, metric="euclidean", neighbor_seed=3)
    fit_many(linear, FEATURES, LABELS, [spelled_out], checkpoint=tmp_path)
    fit_many(linear, FEATURES, LABELS, [dict(epochs=1, metric="cosine", neighbor_seed=3)], checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    configs = [dict(epochs=1, **config) for config in NEIGHBORS]
    for order in (configs, configs[::-1]):
        runs = fit_many(linear, FEATURES, LABELS, order, checkpoint=tmp_path)
        assert [run.error for run in runs] == [""] * 3
    assert len(list(tmp_path.iterdir())) == 4
    assert first[0].error == ""


def test_a_damaged_checkpoint_spoils_one_run_alone(linear, tmp_path):
    configs = [dict(epochs=2), dict(epochs=2, gamma=0.5)]
    fit_many(linear, FEATURES, LABELS, configs[:1], checkpoint=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    runs = fit_many(linear, FEATURES, LABELS, configs, checkpoint=tmp_path)
    assert "cannot be read as one of fit's" in runs[0].error and runs[1].error == ""


def test_best_few_without_few_validation_samples_is_refused_before_training(linear):
    features, labels = make_data(seed=5)
    base = labels < 6
    with pytest.raises(ValueError, match=r"configs\[0\]: val_labels has no sample of a few class"):
        fit_many(linear, FEATURES, LABELS, [dict(select="best_few")], val_features=features[base], val_labels=labels[base])


def test_many_above_is_that_of_the_metrics(linear):
    (run,) = fit_many(linear, FEATURES, LABELS, [dict(pool="many", epochs=1)], many_above=25, **VALIDATION)
    assert run.result.after["many"] == run.result.after["many"] and run.result.after["medium"] != run.result.after["medium"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [5, 6, 9, 30])
def test_odd_widths_give_the_bits_of_training_alone(width, dtype):
    """Matrix libraries may round a row by its place in the product, which depends on the other configurations' samples."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(8).repeat_interleave(torch.tensor([120, 110, 60, 50, 40, 30, 8, 6]))
    features = torch.randn(len(labels), width, generator=generator, dtype=dtype)
    linear = torch.nn.Linear(width, 8, dtype=dtype)
    configs = [dict(gamma=0.7, top_k=2, epochs=5, seed=seed, negative_ratio=ratio) for seed in (0, 1) for ratio in (0.0, 1.0)]
    together = fit_many(linear, features, labels, configs, progress=False)
    for config, run in zip(configs, together, strict=True):
        (alone,) = fit_many(linear, features, labels, [config], progress=False)
        assert torch.equal(alone.head.w2, run.head.w2) and torch.equal(alone.head.b2, run.head.b2)
        assert [entry["loss"] for entry in alone.result.history[1:]] == [entry["loss"] for entry in run.result.history[1:]]


def test_drawn_samples_that_do_not_fit_are_made_anew_with_the_same_bits(linear, monkeypatch):
    config = dict(preset_options("few", pool_size=4), epochs=2, few_bias=False, residual=3, seed=0)
    (kept,) = fit_many(linear, FEATURES, LABELS, [config], progress=False)
    monkeypatch.setattr(cached_logits, "CACHE_BYTES", 0)
    (anew,) = fit_many(linear, FEATURES, LABELS, [config], progress=False)
    assert torch.equal(kept.head.b2, anew.head.b2) and torch.equal(kept.head.residual, anew.head.residual)
    rows = []
    monkeypatch.setattr(cached_logits, "_allocate", lambda shape, *_: rows.append(shape) or torch.empty(shape))
    fit_many(linear, FEATURES, LABELS, [config], progress=False)
    assert rows[0][0] == 8 * 8  # an epoch's samples: eight of each class


def test_what_does_not_fit_is_refused_before_it_is_computed(linear, monkeypatch):
    monkeypatch.setattr(cached_logits, "_available_bytes", lambda: 1000)
    monkeypatch.setattr(cached_logits, "_blocks", None)
    with pytest.raises(
        MemoryError, match=r"the member logits of \d+ samples need .* GiB, and 0\.0 GiB .* are free: less samples"
    ):
        fit_many(linear, FEATURES, LABELS, [{"epochs": 1}], **VALIDATION)
