"""The training benchmark runs, at sizes of no interest, and renders what it measured."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import training as bench

TINY = bench.Dataset("tiny", 40, 6, 50, 1000, 70, in_features=16, pca_dim=8, top_k=3)
ARGUMENTS = argparse.Namespace(repeats=1, sweep_seeds=1)


def test_published_class_counts():
    for dataset in (*bench.DATASETS.values(), bench.INATURALIST):
        counts = bench.class_counts(dataset)
        assert len(counts) == dataset.num_classes and counts.sum() == dataset.samples
        assert counts[-dataset.num_few :].sum() == dataset.few_samples
        assert counts[-dataset.num_few :].max() < 20 <= counts[: -dataset.num_few].min()


def test_whole_training():
    problem = bench.make_problem(TINY)
    before = problem.head.w2.clone()
    result = bench.native_training(problem, 2, epochs=3)
    assert result["steps"] == 3 * 2 and len(result["training_s_all"]) == 2
    assert problem.head.w2.equal(before)  # every repeat starts alike, and so does who comes after
    assert bench.native_training(bench.make_shared(problem), 1, epochs=2)["training_s"] > 0
    assert bench.preparation(problem, 1)["ratio"] > 0
    assert bench.step_time(TINY, repeats=1) > 0


def test_eager_factored_takes_the_native_engines_step():
    """The strongest Python rival must compute the same thing, or the comparison is of nothing."""
    problem = bench.make_problem(TINY)
    head = problem.head
    module = bench.EagerFactored(head)
    logits = torch.nn.functional.linear(problem.features[:5], head.weight, head.bias)
    is_base = torch.ones(head.out_features, dtype=torch.bool)
    is_base[head.few_classes] = False
    scores = module(logits[:, head.members], logits[:, is_base].logsumexp(dim=1))
    expected = head.mix_logits(logits)
    torch.testing.assert_close(scores[:, :-1], expected[:, head.few_classes])
    torch.testing.assert_close(scores.logsumexp(dim=1), expected.logsumexp(dim=1))


def test_tables(monkeypatch):
    monkeypatch.setattr(bench, "DATASETS", {"imagenet-lt": replace(TINY, name="imagenet-lt")})
    monkeypatch.setattr(
        bench.providers, "SIZES", {"imagenet-lt": bench.providers.Size("imagenet-lt", 40, 6, 8, 50, top_k=3, in_features=16)}
    )
    monkeypatch.setattr(bench, "INATURALIST", TINY)
    monkeypatch.setattr(
        bench.providers, "PROVIDERS", {k: v for k, v in bench.providers.PROVIDERS.items() if "compile" not in k}
    )
    peers = bench.peers
    monkeypatch.setattr(bench, "peers", lambda dataset, problem, repeats: peers_without_compile(peers, dataset, problem))
    results = {"machine": {"cores": 2}, "training": bench.training_part(ARGUMENTS)}
    results["sweep"] = bench.sweep_part(ARGUMENTS)
    results["inaturalist"] = bench.inaturalist_part(ARGUMENTS)
    text = bench.markdown(results)
    for words in ("imagenet-lt", "paper loop", "eager factored", "Sweep", "iNaturalist"):
        assert words in text
    assert results["sweep"]["runs"] == 9 and not results["sweep"]["failed"]


def peers_without_compile(peers, dataset, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PEERS", ("paper loop", "alphaext dense"))
        return peers(dataset, problem, 1)
