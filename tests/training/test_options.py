"""Options of `fit` beyond the paper: direct coefficients, residual, L2, balanced and drawn samples, prior, constant."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_engines import TOLERANCES, assert_same_history, make_data, make_head, validation
from torch import Tensor, nn
from torch.nn import functional

from alphaext import AlphaNet, fit, fit_many, reference
from alphaext.training.builder import training_data
from alphaext.training.few_bias import choose_few_bias
from alphaext.training.options import TrainingOptions
from alphaext.training.sampling import EpochSampler

SHORT = dict(epochs=3, batch_size=16, lr=0.05, progress=False)


def direct_head(dtype=torch.float64, directions=2, bias=True, **options) -> AlphaNet:
    like = make_head(dtype=dtype, bias=bias)
    along = {}
    if directions:
        rows = torch.randn(directions, like.in_features, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        along = {"directions": rows.to(dtype), "direction_bias": rows[:, 0].to(dtype) if bias else None}
    return AlphaNet(like.weight, like.bias, like.members, None, coefficients="direct", **along, **options)


def trained(head: AlphaNet) -> Tensor:
    return head.outputs().detach().clone()


OPTIONS = {
    "plain": {},
    "L2": dict(regularize=0.2),
    "prior": dict(prior_correction=True),
    "prior, class-balanced negatives": dict(prior_correction=True, negative_ratio=2.0, negative_sampling="class_balanced"),
    "balanced": dict(samples_per_class=3),
    "drawn": dict(samples_per_class=5, augment="neighbors", augment_samples=9, augment_neighbors=3),
    "all": dict(
        samples_per_class=5, augment="neighbors", augment_samples=7, regularize=0.05, prior_correction=True, weight_decay=0.01
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["direct", "residual", "mlp", "shared", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_engines_train_the_same(name, kind, dtype):
    options, results = OPTIONS[name] | SHORT, {}
    data, held_out = make_data(dtype), validation(dtype)
    for engine in ("native", "autograd"):
        head = {
            "direct": lambda: direct_head(dtype, 0),
            "residual": lambda: direct_head(dtype, 2, gamma=0.8),
            "mlp": lambda: make_head(dtype=dtype, first_layer="factored", hidden_dim=5, init="default"),
            "shared": lambda: make_head(dtype=dtype, first_layer="factored", hidden_dim=5, init="default", shared=True),
            "softmax": lambda: make_head(dtype=dtype, first_layer="factored", hidden_dim=5, init="default", rule="softmax"),
        }[kind]()
        result = fit(head, *data, **held_out, **options, select="last", engine=engine)
        assert result.engine == engine
        results[engine] = trained(head), result
    torch.testing.assert_close(*(results[engine][0] for engine in results), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert_same_history(results["native"][1], results["autograd"][1], 10 * TOLERANCES[dtype])


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_what_the_reference_says(bias):
    """A plain loop over the reference: direct coefficients, a residual, L2, the prior, drawn samples, balanced classes."""
    options = TrainingOptions(
        epochs=2, batch_size=16, lr=0.1, samples_per_class=4, augment="neighbors", augment_samples=6, regularize=0.3,
        prior_correction=True,
    )  # fmt: skip
    head = direct_head(bias=bias)
    features, labels = make_data()
    data = training_data(head, features, labels, None, None, options)
    start = head.identity_outputs()
    outputs = start.repeat(head.num_few, 1).requires_grad_()
    optimizer = torch.optim.SGD([outputs], lr=0.1, momentum=0.9)
    for epoch in (1, 2):
        for batch in data.sampler.indices[data.sampler.draw(epoch)].split(16):
            raw, amounts = outputs[:, :4], outputs[:, 4:]
            alpha = reference.coefficients(raw, head.gamma, head.rule, head.projected_gradient)
            weight, offset = reference.compose(alpha, head.weight, head.bias, head.members)
            weight, offset = reference.add_residual(weight, offset, amounts, head.directions, head.direction_bias)
            scores = reference.scores(data.samples.features[batch], head.weight, head.bias, head.members, weight, offset)
            loss = functional.cross_entropy(scores + data.sampler.log_prior, data.samples.labels[batch])
            loss = loss + 0.3 / 2 * (outputs - start).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    fit(head, features, labels, **vars(options), progress=False)
    torch.testing.assert_close(trained(head), outputs.detach(), rtol=1e-10, atol=1e-10)


def test_the_penalty_draws_to_the_original_classifier():
    far, near = direct_head(), direct_head()
    features, labels = make_data()
    fit(far, features, labels, **SHORT)
    fit(near, features, labels, **SHORT, regularize=10.0)
    start = far.identity_outputs()
    assert float((trained(near) - start).norm()) < float((trained(far) - start).norm()) / 5


def test_the_prior_is_told_by_what_is_drawn():
    _, labels = make_data(per_base=10, per_few=4)
    few = torch.tensor([6, 7, 8])
    expected = {
        (2.0, "uniform"): [10.0] * 6 + [4 / (24 / 60)] * 3,
        (0.5, "class_balanced"): [1.0] * 6 + [4.0] * 3,
    }
    for (ratio, sampling), frequencies in expected.items():
        options = TrainingOptions(negative_ratio=ratio, negative_sampling=sampling)
        sampler = EpochSampler(labels, few, 9, options)
        torch.testing.assert_close(sampler.log_prior.exp(), torch.tensor(frequencies, dtype=torch.float64))
        drawn = sum(torch.bincount(labels[sampler.indices[sampler.draw(epoch)]], minlength=9) for epoch in range(200))
        counted = drawn.double() / drawn[8]
        torch.testing.assert_close(counted, torch.tensor(frequencies, dtype=torch.float64) / frequencies[8], rtol=0.12, atol=0)
    balanced = EpochSampler(labels, few, 9, TrainingOptions(samples_per_class=3))
    assert float(balanced.log_prior.max() - balanced.log_prior.min()) == 0


def test_an_epoch_has_so_many_of_every_class():
    labels = torch.arange(4).repeat_interleave(torch.tensor([9, 6, 2, 1]))
    sampler = EpochSampler(labels, torch.tensor([2, 3]), 4, TrainingOptions(samples_per_class=4, seed=3))
    assert len(sampler) == 16 and sampler.negatives == 8 and sampler.num_few == 3
    epochs = [sampler.indices[sampler.draw(epoch)] for epoch in (1, 2)]
    for drawn in epochs:
        assert torch.bincount(labels[drawn]).tolist() == [4, 4, 4, 4]
        base = drawn[labels[drawn] < 2]
        assert len(base.unique()) == 8  # without replacement where there are enough
    assert epochs[0].tolist() != epochs[1].tolist() and torch.equal(epochs[0], sampler.indices[sampler.draw(1)])
    assert set(torch.cat(epochs).tolist()) <= set(sampler.used(range(1, 3)).tolist())
    # Drawn samples stand in for the real few ones.
    instead = EpochSampler(torch.cat([labels, torch.tensor([2, 2, 3])]), torch.tensor([2, 3]), 4,
                           TrainingOptions(samples_per_class=2), first_few=18)  # fmt: skip
    assert instead.indices[:3].tolist() == [18, 19, 20] and len(instead.indices) == 3 + 15


def test_the_constant_is_the_best_that_validation_samples_know():
    features, labels = make_data()
    held_out = validation()
    plain, shifted = direct_head(directions=0), direct_head(directions=0)
    fit(plain, features, labels, **held_out, **SHORT, select="last", keep_original=False)
    result = fit(shifted, features, labels, **held_out, **SHORT, few_bias=True, keep_original=False)
    assert torch.equal(trained(plain), trained(shifted)) and result.selected_epoch == 3 and result.selection == "last"
    split = [torch.tensor([6, 7, 8]), torch.arange(6), torch.tensor([], dtype=torch.int64)]
    from alphaext import ClassSplit

    found = choose_few_bias(plain.fold(), *held_out.values(), ClassSplit(few=split[0], medium=split[1], many=split[2]))
    assert shifted.few_bias == result.few_bias == found.chosen["offset"]
    scores = shifted(held_out["val_features"])
    right = (scores.argmax(dim=1) == held_out["val_labels"]).double().mean()
    assert result.metrics_after["all"] == pytest.approx(float(right))
    assert result.metrics_after["all"] >= max(result.history[-1]["all"], result.metrics_before["all"])
    # A training begins without the constant of one before.
    fit(shifted, features, labels, **SHORT)
    assert shifted.few_bias == 0
    with pytest.raises(ValueError, match="few_bias is chosen on validation samples"):
        fit(plain, features, labels, few_bias=True)


def test_few_best_bounds_the_constant():
    features, labels = make_data()
    head = direct_head(directions=0)
    result = fit(head, features, labels, **validation(), **SHORT, few_bias=True, select="best_few", min_all=0.05)
    assert result.metrics_after["all"] >= 0.05 and result.metrics_after["few"] >= result.metrics_before["few"]


CONFIGS = [
    dict(coefficients="direct"),
    dict(coefficients="direct", residual=3, regularize=0.1),
    dict(coefficients="direct", residual=2, samples_per_class=3, augment="neighbors", augment_samples=6),
    dict(coefficients="direct", residual=2, samples_per_class=3, augment="neighbors", augment_samples=6, seed=4),
    dict(prior_correction=True),
    dict(prior_correction=True, negative_ratio=2.0),
    dict(samples_per_class=2, few_bias=True, gamma=0.7),
]


@pytest.mark.parametrize("bias", [True, False])
def test_many_at_once_are_each_one_alone(bias, tmp_path):
    linear = nn.Linear(7, 9, bias=bias)
    features, labels = make_data(torch.float32, per_base=21, in_features=7)
    held_out = validation(torch.float32, in_features=7)
    common = dict(top_k=2, epochs=2, batch_size=16)
    configs = [common | config for config in CONFIGS]
    together = fit_many(linear, features, labels, configs, **held_out, progress=False)
    for config, run in zip(configs, together, strict=True):
        (alone,) = fit_many(linear, features, labels, [config], **held_out, progress=False)
        assert run.error == alone.error == ""
        assert torch.equal(trained(run.head), trained(alone.head)) and run.head.few_bias == alone.head.few_bias
        assert run.result.metrics_after == pytest.approx(alone.result.metrics_after, abs=0, nan_ok=True)
    # From checkpoints: nothing is trained again, and a constant is chosen again.
    for _ in range(2):
        again = fit_many(linear, features, labels, configs, **held_out, checkpoint=tmp_path, progress=False)
    for run, other in zip(together, again, strict=True):
        assert torch.equal(trained(run.head), trained(other.head)) and run.head.few_bias == other.head.few_bias


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path):
    options = OPTIONS["all"] | SHORT
    features, labels = make_data()
    whole, part = direct_head(seed=0), direct_head(seed=0)
    fit(whole, features, labels, **options)
    fit(part, features, labels, **(options | {"epochs": 1}), checkpoint=tmp_path / "c.pt")
    part = direct_head(seed=0)
    fit(part, features, labels, **options, checkpoint=tmp_path / "c.pt")
    assert torch.equal(trained(part), trained(whole))
    with pytest.raises(ValueError, match="regularize is 0.2 here and 0.05 there"):
        fit(direct_head(seed=0), features, labels, **(options | {"regularize": 0.2}), checkpoint=tmp_path / "c.pt")


@pytest.mark.parametrize("other", [dict(regularize=5.0), dict(samples_per_class=4), dict(prior_correction=True)])
def test_a_checkpoint_of_other_options_is_refused_either_way(tmp_path, other):
    features, labels = make_data()
    for first, second in ((other, {}), ({}, other)):
        path = tmp_path / f"{len(first)}.pt"
        fit(direct_head(seed=0), features, labels, **SHORT, **first, checkpoint=path)
        head = direct_head(seed=0)
        head.few_bias = 1.5
        with pytest.raises(ValueError, match="belongs to another training"):
            fit(head, features, labels, **SHORT, **second, checkpoint=path)
        assert head.few_bias == 1.5  # what is refused changes nothing


def test_any_optimizer_trains_direct_coefficients():
    features, labels = make_data()
    head = direct_head()
    result = fit(head, features, labels, **SHORT, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), regularize=0.1)
    assert result.engine == "autograd" and result.history[-1]["loss"] < result.history[1]["loss"]


def test_samples_are_drawn_where_a_base_class_has_none():
    features, labels = make_data()
    kept = labels != 2
    head = direct_head()
    fit(head, features[kept], labels[kept], **OPTIONS["drawn"], **SHORT)
    assert head.outputs().isfinite().all()


def test_few_logits_that_do_not_fit_are_made_anew(monkeypatch):

    features, labels = make_data()
    heads = []
    from alphaext.training import cached_logits

    for limit in (cached_logits.CACHE_BYTES, 0):
        monkeypatch.setattr(cached_logits, "CACHE_BYTES", limit)
        heads.append(direct_head())
        fit(heads[-1], features, labels, **OPTIONS["drawn"], **SHORT)
    assert torch.equal(trained(heads[0]), trained(heads[1]))


def test_options_that_disagree_are_refused():
    features, labels = make_data()

    def refused(message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            fit(direct_head(), features, labels, **options)

    refused("needs samples_per_class", augment="neighbors")
    refused("augment must be one of neighbors, got 'mixup'", augment="mixup", samples_per_class=2)
    refused("already says how many", samples_per_class=2, negative_ratio=2.0)
    refused("already says how many", samples_per_class=2, negative_sampling="class_balanced")
    refused("samples_per_class must be between 1 and", samples_per_class=0)
    refused("augment_samples must be between 1 and 1000000", samples_per_class=1, augment="neighbors", augment_samples=0)
    refused("regularize must be finite and at least 0", regularize=-1.0)
    refused("prior_correction needs base samples", prior_correction=True, negative_ratio=0.0)
    refused("regularize", TypeError, regularize="much")
    refused("regularize must be finite and at least 0 and at most 1e6", regularize=1e300)
    refused("prior_correction needs base samples", prior_correction=True, negative_ratio=0.001)
    for samples in itertools.islice([7, 8], 2):
        with pytest.raises(ValueError, match="labels has no sample of the few classes"):
            fit(direct_head(), features[labels != samples], labels[labels != samples], samples_per_class=2)


def test_a_result_shows_itself():
    pytest.importorskip("matplotlib")
    result = fit(direct_head(), *make_data(), **validation(), **SHORT)
    assert len(result.plot().axes) >= 1
    assert "<table" in result._repr_html_() and "</table>" in result._repr_html_()
