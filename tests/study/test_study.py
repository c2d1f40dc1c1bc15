"""A study of a small problem: its rows, what it chooses, what happens when it is interrupted."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from alphaext import fit_many, split_classes
from alphaext.checkpoints import save_linear
from alphaext.commands.study import Study
from alphaext.features import read_features, write_features
from alphaext.metrics import predict, split_metrics
from alphaext.study import trials as study_trials
from alphaext.study.plans import CONFIGURATION, EXPERIMENTS, POLICIES, StudyOptions, choose, plan
from alphaext.study.rows import COLUMNS, make_row, read_rows, row_key, summarize, write_rows
from alphaext.study.run import CLASSES, RESULTS, ROWS, run_study
from alphaext.study.trials import CHECKPOINTS, cut_few_samples
from alphaext.training import single as training

COUNTS = [60, 50, 40, 30, 25, 9, 7, 5]
FEW = [5, 6, 7]
SPLIT = {"few_below": 10, "many_above": 35}
OPTIONS = StudyOptions(
    seeds=2,
    gammas=[0.5, 0.7, 1.0],
    top_ks=[1, 2, 3],
    few_samples=[1, 5],
    negative_ratios=[0, 1, 4],
    forms=["plain"],
    top_k=2,
    epochs=3,
    pca_dim=4,
    retraining_epochs=2,
    retraining_lrs=[0.1],
)
GAMMAS, SEEDS, FIXED = 3, 2, 2


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> tuple[Path, nn.Linear]:
    """Cached features of eight classes, and a classifier that prefers the frequent ones."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("features")
    centres = 1.2 * torch.randn(8, 6, generator=generator)
    for part, counts in (("train", COUNTS), ("val", [12] * 8), ("test", [15] * 8)):
        labels = torch.arange(8).repeat_interleave(torch.tensor(counts))
        features = centres[labels] + torch.randn(len(labels), 6, generator=generator)
        write_features(folder / part, features, labels, num_classes=8, class_names=list("abcdefgh"))
    linear = nn.Linear(6, 8)
    linear.weight.data.copy_(centres)
    linear.bias.data.copy_(-centres.square().sum(dim=1) / 2 + torch.tensor(COUNTS).log())
    return folder, linear


def run(problem, folder: Path, options: StudyOptions = OPTIONS, **others):
    features, linear = problem
    return run_study(features, linear, folder, options, progress=False, jobs=1, **SPLIT, **others)


@pytest.fixture(scope="module")
def study(problem, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a whole study, and what it returned. Not to be changed."""
    folder = tmp_path_factory.mktemp("study") / "all"
    return folder, run(problem, folder, attribution="drawn at random")


def rows_of(folder: Path, experiment: str) -> list[dict]:
    return [row for row in read_rows(folder / ROWS) if row["experiment"] == experiment]


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def values_of(rows: list[dict], name: str) -> set:
    return {row[name] for row in rows}


@pytest.mark.parametrize(
    ("experiment", "number", "varied"),
    [
        ("original", 1, {}),
        ("gamma", GAMMAS * SEEDS, {"gamma": {0.5, 0.7, 1.0}}),
        ("top-k", 3 * FIXED * SEEDS, {"top_k": {1, 2, 3}, "gamma": {0.7, 1.0}}),
        ("pool", 3 * GAMMAS * SEEDS, {"pool": {"many", "base", "all"}, "gamma": {0.5, 0.7, 1.0}}),
        ("sharing", 2 * GAMMAS * SEEDS, {"shared": {True, False}, "gamma": {0.5, 0.7, 1.0}}),
        ("negatives", 3 * SEEDS, {"negative_ratio": {0.0, 1.0, 4.0}, "gamma": {0.5}}),
        ("rule", (FIXED + 2) * SEEDS, {"rule": {"clamp", "softmax", "l1"}}),
        ("start", 4 * FIXED * SEEDS, {"init": {"identity", "default"}, "projected_gradient": {True, False}}),
        ("controls", 3 * FIXED * SEEDS + GAMMAS, {"metric": {"euclidean", "random", "cosine"}, "epochs": {0, 3}}),
        ("data-size", 3 * FIXED * SEEDS, {"few_samples": {1, 5, None}}),
        ("beyond", 20 * SEEDS, {"few_bias": {True, False}, "prior_correction": {True, False}, "top_k": {1, 2, 5}}),
        ("candidates", (2 * GAMMAS + 2 + 2) * SEEDS + 3, {"gamma": {0.5, 0.7, 1.0, None}}),
        ("compare", 5 + 6 * SEEDS, {"chosen_on": {None, "val"}}),
    ],
)
def test_every_experiment_has_its_rows(study, experiment, number, varied):
    rows = rows_of(study[0], experiment)
    assert len(rows) == number
    for name, values in varied.items():
        assert values_of(rows, name) == values
    for row in rows:
        assert row["error"] is None
        assert all(0 <= row[f"{part}_{name}"] <= 1 for part in ("val", "test") for name in ("few", "all", "many_top5"))
        assert 0 <= row["test_few_calibration_error"] <= 1


def test_rivals_and_seeds(study):
    folder, _ = study
    compared = rows_of(folder, "compare")
    of_seeds = ["crt", "lws", "Alpha Net", "Alpha Net, paper's form", "Alpha Net, preset few", "free rows"]
    names = ["original", "ncm", "tau", "logit-adjustment", "few-bias", *(name for name in of_seeds for _ in range(2))]
    assert [row["method"] for row in compared] == names
    assert [row["seed"] for row in compared] == [None] * 5 + [0, 1] * 6
    # A chosen one is one of the candidates, to the last digit.
    candidates = {(row["method"], row["gamma"], row["seed"]): row["test_all"] for row in rows_of(folder, "candidates")}
    for row in compared[5:]:
        assert candidates[row["method"], row["gamma"], row["seed"]] == row["test_all"]
        of_seed = [
            entry for entry in rows_of(folder, "candidates") if (entry["method"], entry["seed"]) == (row["method"], row["seed"])
        ]
        assert row["val_all"] == max(entry["val_all"] for entry in of_seed)


def test_the_front_trades_few_for_all(study):
    front = rows_of(study[0], "few-bias-front")
    offsets = [row["offset"] for row in front]
    assert offsets == sorted(offsets) and len(offsets) > 10
    assert [row["test_few"] for row in front] == sorted(row["test_few"] for row in front)
    assert front[-1]["test_many"] < front[0]["test_many"]


def test_results_file(study, problem):
    folder, returned = study
    on_disk = json.loads((folder / RESULTS).read_text())
    assert on_disk == json.loads(json.dumps(returned))
    assert on_disk["experiments"] == list(EXPERIMENTS)
    assert on_disk["attribution"] == "drawn at random"
    assert on_disk["rows"] == len(read_rows(folder / ROWS)) and "finished" in on_disk
    assert all(choice["chosen_on"] == "val" for choice in on_disk["choices"])
    assert {choice["method"] for choice in on_disk["choices"]} >= {"tau", "ncm", "few-bias", "Alpha Net"}
    assert "test" not in json.dumps(on_disk["choices"])
    assert not (folder / CHECKPOINTS).exists()
    with (folder / ROWS).open() as file:
        assert next(csv.reader(file)) == list(COLUMNS)


def test_classes_of_the_chosen_net(study):
    folder, _ = study
    with (folder / CLASSES).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list("abcdefgh")
    assert [int(row["training_images"]) for row in rows] == COUNTS
    chosen = next(row for row in rows_of(folder, "compare") if row["method"] == "Alpha Net" and row["seed"] == 0)
    few = [float(row["accuracy_after"]) for row in rows if row["split"] == "few"]
    assert sum(few) / len(few) == pytest.approx(chosen["test_few"])
    assert all(row["distance"] and row["own_alpha"] for row in rows if row["split"] == "few")


def test_shared_sub_modules_are_smaller(study):
    rows = rows_of(study[0], "sharing")
    dense = {shared: {row["dense_parameter_bytes"] for row in rows if row["shared"] is shared} for shared in (True, False)}
    # P = H = 4 inputs and hidden units, K + 1 = 3 members, of float32.
    of_one = ((3 * 4 + 1) * 4 + 3 * (4 + 1)) * 4
    assert dense == {True: {of_one}, False: {3 * of_one}}
    trained = {shared: {row["parameter_bytes"] for row in rows if row["shared"] is shared} for shared in (True, False)}
    assert max(trained[True]) < min(trained[False])
    assert all(row["seconds"] > 0 for row in rows)


def test_frozen_uniform_alphas_are_computed_directly(study, problem):
    features, linear = problem
    train, test = read_features(features / "train"), read_features(features / "test")
    split = split_classes(train.class_counts(), **SPLIT)
    frozen = [row for row in rows_of(study[0], "controls") if row["method"] == "frozen uniform alphas"]
    assert values_of(frozen, "seed") == {None} and values_of(frozen, "epoch") == {0}
    means = train.class_means()
    for row in frozen:
        gamma = row["gamma"]
        composed = nn.Linear(6, 8)
        composed.load_state_dict(linear.state_dict())
        for own in FEW:
            distance = (means[:5] - means[own]).norm(dim=1)
            near = distance.argsort()[:2]
            for name in ("weight", "bias"):
                old = getattr(linear, name).data
                getattr(composed, name).data[own] = gamma * old[own] + (1 - gamma) / 2 * old[near].sum(dim=0)
        expected = split_metrics(predict(composed, test.features, test.labels), split)
        for name in ("few", "all", "all_top5"):
            assert row[f"test_{name}"] == pytest.approx(expected[name])


def test_experiments_that_share_a_training_agree(study):
    found: dict = {}
    for row in read_rows(study[0] / ROWS):
        if row["top_k"] is not None:
            key = (*(row[name] for name in CONFIGURATION), row["seed"])
            found.setdefault(key, set()).add((row["seconds"], row["val_all"], row["test_few"]))
    assert all(len(values) == 1 for values in found.values())


def test_trainings_are_those_of_fit_many(study, problem):
    features, linear = problem
    train, val, test = (read_features(features / part) for part in ("train", "val", "test"))
    split = split_classes(train.class_counts(), **SPLIT)
    row = next(row for row in rows_of(study[0], "negatives") if row["negative_ratio"] == 0 and row["seed"] == 1)
    config = {"gamma": 0.5, "top_k": 2, "epochs": 3, "negative_ratio": 0, "seed": 1, "pca_dim": 4, "keep_original": False}
    (made,) = fit_many(linear, train.features, train.labels, [config], val_features=val.features, val_labels=val.labels,
                       split=split, progress=False)  # fmt: skip
    assert made.head is not None and made.result is not None
    assert split_metrics(predict(made.head.fold(), test.features, test.labels), split)["all"] == row["test_all"]
    assert made.result.metrics_after is not None
    assert made.result.metrics_after["few"] == row["val_few"] and made.result.selected_epoch == row["epoch"]


SOME = replace(OPTIONS, experiments=("negatives", "data-size", "compare"), seeds=1, few_samples=[1])


@pytest.fixture(scope="module")
def some(problem, tmp_path_factory) -> Path:
    """The folder of a smaller study, never interrupted; in several calls of fit_many. Not to be changed."""
    folder = tmp_path_factory.mktemp("some") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_trials, "_MOST_HEAD_BYTES", 4000)
        run(problem, folder, SOME)
    return folder


@pytest.mark.parametrize(
    ("where", "when"),
    [("measured", when) for when in (1, 2, 6, 12, 22)] + [("end_epoch", when) for when in (1, 5, 17, 30)],
)
def test_interrupted_studies_end_with_the_same_rows(problem, some, tmp_path, monkeypatch, where, when):
    monkeypatch.setattr(study_trials, "_MOST_HEAD_BYTES", 4000)
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    calls = {"measured": 0, "end_epoch": 0}
    stop_at = {where: when}

    def counted(owner, name):
        original = getattr(owner, name)

        def counts(*arguments):
            calls[name] += 1
            if calls[name] == stop_at.get(name):
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(owner, name, counts)

    counted(study_trials.Problem, "measured")
    counted(training.Run, "end_epoch")
    with pytest.raises(KeyboardInterrupt):
        run(problem, tmp_path, SOME)
    assert "finished" not in json.loads((tmp_path / RESULTS).read_text())
    kept = read_rows(tmp_path / ROWS)
    measured = calls["measured"] - (where == "measured")
    assert len(kept) >= measured
    stop_at.clear()
    run(problem, tmp_path, SOME)
    assert without_seconds(read_rows(tmp_path / ROWS)) == without_seconds(read_rows(some / ROWS))
    assert (tmp_path / CLASSES).read_bytes() == (some / CLASSES).read_bytes()
    # Nothing is measured twice, and no epoch trained twice (but those of the one that was interrupted).
    trainings = {trial.training for trial in plan(SOME)}
    rivals = 1 + 3 + 3 + 2 + len(rows_of(some, "few-bias-front"))
    assert calls["measured"] - (where == "measured") == len(trainings) + rivals
    assert calls["end_epoch"] - (where == "end_epoch") == sum(each.training.epochs for each, _ in trainings)
    results = [json.loads((folder / RESULTS).read_text()) for folder in (some, tmp_path)]
    assert results[0]["summary"] == results[1]["summary"] and results[0]["choices"] == results[1]["choices"]


def test_a_finished_study_does_nothing_again(study, problem, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(study[0], folder)
    monkeypatch.setattr(study_trials, "fit_many", None)
    monkeypatch.setattr(study_trials.Problem, "measured", None)
    again = run(problem, folder)
    assert again["attribution"] == "drawn at random"
    assert (folder / ROWS).read_bytes() == (study[0] / ROWS).read_bytes()
    assert again["summary"] == study[1]["summary"]


def test_more_experiments_and_seeds_may_come_later(problem, tmp_path):
    run(problem, tmp_path, replace(OPTIONS, experiments=["top-k"], seeds=1))
    later = run(problem, tmp_path, replace(OPTIONS, experiments=["negatives"], seeds=2))
    assert later["experiments"] == ["top-k", "negatives"]
    rows = read_rows(tmp_path / ROWS)
    assert [row["experiment"] for row in rows] == ["original", *["top-k"] * 6, *["negatives"] * 6]
    assert [row["seed"] for row in rows[7:]] == [0, 1] * 3


def test_a_later_comparison_with_fewer_or_more_seeds_loses_none(problem, tmp_path):
    one, two = (replace(OPTIONS, experiments=["compare"], seeds=seeds) for seeds in (1, 2))
    run(problem, tmp_path, one)
    whole = run(problem, tmp_path, two)
    rows = rows_of(tmp_path, "compare")
    assert [row["seed"] for row in rows] == [None] * 5 + [0, 1] * 6
    again = run(problem, tmp_path, one)
    assert sorted(map(str, rows_of(tmp_path, "compare"))) == sorted(map(str, rows))
    assert sorted(map(str, again["choices"])) == sorted(map(str, whole["choices"]))


def test_a_study_that_goes_on_trains_the_same_together(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(study_trials, "_MOST_HEAD_BYTES", 2000)
    calls = []
    fit_many = study_trials.fit_many

    def watched(linear, features, labels, configs, **options):
        calls.append({json.dumps(config, sort_keys=True) for config in configs})
        return fit_many(linear, features, labels, configs, **options)

    monkeypatch.setattr(study_trials, "fit_many", watched)
    run(problem, tmp_path, SOME)
    whole = list(calls)
    calls.clear()
    # As if it had been stopped amid the measurements of the first call, after its first training.
    kept = [row for row in read_rows(tmp_path / ROWS) if row["method"] == "original" or row["negative_ratio"] == 0]
    write_rows(kept, tmp_path / ROWS)
    run(problem, tmp_path, SOME)
    assert len(whole) > 3 and all(any(call <= other for other in whole) for call in calls)
    assert sum(map(len, calls)) == sum(map(len, whole)) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": replace(OPTIONS, epochs=2, experiments=["top-k"])}, "options.epochs is 2 here and 3 there"),
        ({"linear": nn.Linear(6, 8)}, "classifier is"),
        ({"split": {"few_below": 8, "many_above": 35}}, "few_below is 8 here and 10 there"),
    ],
)
def test_another_study_is_refused(problem, study, change, message):
    features, linear = problem
    before = (study[0] / ROWS).read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        run_study(
            features, change.get("linear", linear), study[0], change.get("options", OPTIONS), **change.get("split", SPLIT)
        )
    assert "--overwrite" in str(error.value)
    assert (study[0] / ROWS).read_bytes() == before


def test_other_features_are_refused(problem, study, tmp_path):
    features, linear = problem
    for part in ("train", "val"):
        shutil.copytree(features / part, tmp_path / part)
    test = read_features(features / "test")
    write_features(tmp_path / "test", test.features, test.labels.flip(0), num_classes=8, class_names=list("abcdefgh"))
    with pytest.raises(ValueError, match="features.test.labels_sha256"):
        run_study(tmp_path, linear, study[0], OPTIONS, **SPLIT)


def test_few_classes_may_be_named(problem, tmp_path):
    options = replace(OPTIONS, experiments=["top-k"], top_ks=[1], seeds=1, epochs=1)
    found = run_study(*problem, tmp_path, options, few_classes=["a", "c"], many_above=35)
    assert found["classes"] == {"few": 2, "medium": 5, "many": 1} and found["identity"]["few_classes"] == [0, 2]
    with pytest.raises(ValueError, match="few_classes"):
        run_study(*problem, tmp_path, options, few_classes=["a"], many_above=35)
    with pytest.raises(ValueError, match="few_below"):
        run_study(*problem, tmp_path, options, **SPLIT)


def test_overwrite_starts_anew(problem, tmp_path):
    small = replace(OPTIONS, experiments=["negatives"], seeds=1)
    run(problem, tmp_path, small)
    run(problem, tmp_path, replace(small, epochs=1), overwrite=True)
    assert values_of(rows_of(tmp_path, "negatives"), "epochs") == {1}


def test_what_cannot_be_trained_is_a_row(problem, tmp_path):
    found = run(problem, tmp_path, replace(OPTIONS, experiments=["top-k"], seeds=1, top_ks=[2, 6], fixed_gammas=[1.0]))
    good, bad = rows_of(tmp_path, "top-k")
    assert good["error"] is None and bad["error"] == "not trained: top_k=6, but there are 5 classes in the pool 'base'"
    assert bad["test_all"] is None and found["summary"][2]["errors"] == 1


def test_training_that_diverges_is_a_row(problem, tmp_path):
    run(problem, tmp_path, replace(OPTIONS, experiments=["negatives"], seeds=1, lr=1e38))
    errors = [row["error"] for row in rows_of(tmp_path, "negatives")]
    assert any(error is not None and error.startswith("training diverged") for error in errors)


@pytest.mark.parametrize("passes", [1, 2])
def test_data_size_cuts(passes):
    images = torch.arange(8).repeat_interleave(torch.tensor(COUNTS))
    labels = images.repeat(passes)
    few = torch.tensor(FEW)
    kept = {most: cut_few_samples(labels, few, most, seed=3, passes=passes) for most in (1, 5, 100)}
    for most, rows in kept.items():
        counts = torch.bincount(labels[rows], minlength=8).tolist()
        assert counts == [passes * (min(count, most) if number in FEW else count) for number, count in enumerate(COUNTS)]
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert (rows % len(images)).bincount().unique().tolist() in ([passes], [0, passes])
    assert set(kept[1].tolist()) < set(kept[5].tolist()) < set(kept[100].tolist())
    assert not torch.equal(kept[5], cut_few_samples(labels, few, 5, seed=4, passes=passes))


def test_data_size_trains_on_the_cut(problem, tmp_path, monkeypatch):
    seen = []
    fit_many = study_trials.fit_many

    def watched(linear, features, labels, configs, **options):
        seen.append((torch.bincount(labels, minlength=8).tolist(), len(features), options["split"].few.tolist()))
        return fit_many(linear, features, labels, configs, **options)

    monkeypatch.setattr(study_trials, "fit_many", watched)
    run(problem, tmp_path, replace(OPTIONS, experiments=["data-size"], few_samples=[1, 6]))
    # One call a cut and seed, and one for all that see all samples.
    cut = {1: [*COUNTS[:5], 1, 1, 1], 6: [*COUNTS[:5], 6, 6, 5], None: COUNTS}
    assert sorted(counts for counts, _, _ in seen) == sorted([cut[1]] * 2 + [cut[6]] * 2 + [cut[None]])
    assert all(rows == sum(counts) and few == FEW for counts, rows, few in seen)


def test_small_memory_makes_more_calls_and_the_same_rows(study, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(study_trials, "_MOST_HEAD_BYTES", 1)
    monkeypatch.setattr(study_trials.cached_logits, "CACHE_BYTES", 1000)
    run(problem, tmp_path, replace(OPTIONS, experiments=["rule"]))
    found, expected = rows_of(tmp_path, "rule"), rows_of(study[0], "rule")
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        # The last bits of logits may depend on what else is computed with them.
        assert {name: row[name] for name in (*CONFIGURATION, "seed")} == {
            name: other[name] for name in (*CONFIGURATION, "seed")
        }
        for name in ("val_all", "test_few", "test_all_calibration_error"):
            assert row[name] == pytest.approx(other[name], abs=0.02)


@pytest.mark.parametrize(("policy", "max_drop"), [("best_few", 5.0), ("knee", None)])
def test_other_policies(problem, tmp_path, policy, max_drop):
    options = replace(OPTIONS, experiments=["compare"], seeds=1, policy=policy, max_drop=max_drop)
    run(problem, tmp_path, options)
    original, *compared = rows_of(tmp_path, "compare")
    assert values_of(compared, "policy") == {policy} and len(compared) == 10
    if policy == "best_few":
        assert all(
            row["val_all"] >= original["val_all"] - 0.05 - 1e-9
            for row in compared
            if row["method"] in ("tau", "logit-adjustment", "few-bias", "Alpha Net")  # the others have few candidates
        )
    ncm = [row for row in rows_of(tmp_path, "candidates") if row["method"] == "ncm"]
    assert compared[0]["metric"] == choose(ncm, policy, max_drop, original=original)["metric"]


POOLS_OF_FOUR = dict.fromkeys(("base", "many", "all"), 4)


def test_preset_few_takes_part_where_it_can():
    options = replace(OPTIONS, experiments=["sharing", "negatives", "gamma", "top-k"], forms=["plain", "few"])
    methods = {}
    for trial in plan(options, POOLS_OF_FOUR):
        methods.setdefault(trial.experiment, set()).add(trial.method)
        assert trial.configuration.head.top_k <= 4
    both = {"Alpha Net", "Alpha Net, preset few"}
    assert methods == {"sharing": {"Alpha Net"}, "negatives": {"Alpha Net"}, "gamma": both, "top-k": both}
    # A user's own number is not corrected, but told to be impossible.
    own = replace(options, experiments=["gamma"], forms=["plain"], top_k=60)
    assert plan(own, POOLS_OF_FOUR)[0].configuration.head.top_k == 60


def test_preset_few_is_the_default():
    options = StudyOptions(experiments=["gamma", "top-k", "pool", "sharing", "negatives", "data-size"], seeds=1)
    trials = plan(options, {"base": 40, "many": 7, "all": 40})
    assert all(trial.configuration.head.coefficients == "direct" for trial in trials if trial.experiment == "gamma")
    # Preset few lacks what sharing and negatives vary: the plain form stands for it.
    of_plain = {trial.experiment for trial in trials if trial.method == "Alpha Net"}
    assert of_plain == {"sharing", "negatives"} and {trial.method for trial in trials} == {"Alpha Net", "Alpha Net, preset few"}
    top_ks = {trial.configuration.head.pool: trial.configuration.head.top_k for trial in trials if trial.experiment == "pool"}
    assert top_ks == {"base": 40, "many": 7, "all": 40}


def test_classes_are_of_the_first_form(problem, tmp_path):
    options = replace(OPTIONS, experiments=["compare"], seeds=1, forms=["few"])
    run(problem, tmp_path, options)
    few = (tmp_path / CLASSES).read_bytes()
    run(problem, tmp_path, replace(options, forms=["plain", "few"]))
    plain = (tmp_path / CLASSES).read_bytes()
    assert plain != few
    for folder, forms, expected in ((tmp_path, ["few"], few), (tmp_path / "other", ["plain"], plain)):
        run(problem, folder, replace(options, forms=forms))
        assert (folder / CLASSES).read_bytes() == expected


# Choosing


ROWS_TO_CHOOSE = [
    {"name": "a", "val_few": 0.10, "val_all": 0.50, "test_few": 0.9, "test_all": 0.9},
    {"name": "b", "val_few": 0.30, "val_all": 0.49, "test_few": 0.1, "test_all": 0.1},
    {"name": "c", "val_few": 0.34, "val_all": 0.40, "test_few": 0.0, "test_all": 0.0},
    {"name": "d", "val_few": 0.05, "val_all": 0.30, "test_few": 1.0, "test_all": 1.0},
    {"name": "e", "val_few": None, "val_all": None, "error": "training diverged"},
]


@pytest.mark.parametrize(
    ("policy", "max_drop", "name"),
    [("best_all", None, "a"), ("best_few", None, "a"), ("best_few", 1.0, "b"), ("best_few", 20.0, "c"), ("knee", None, "b")],
)
def test_choose(policy, max_drop, name):
    assert choose(ROWS_TO_CHOOSE, policy, max_drop, original=ROWS_TO_CHOOSE[0])["name"] == name


@pytest.mark.parametrize("part", ["test", "train", "Val", None])
@pytest.mark.parametrize("policy", POLICIES)
def test_choose_refuses_test_samples(part, policy):
    with pytest.raises(ValueError, match="part must be 'val'.*no longer that of new samples"):
        choose(ROWS_TO_CHOOSE, policy, original=ROWS_TO_CHOOSE[0], part=part)


ACCURACY = st.integers(0, 20).map(lambda number: number / 20)


@given(st.lists(st.tuples(ACCURACY, ACCURACY, ACCURACY, ACCURACY), min_size=1, max_size=8), st.sampled_from(POLICIES))
def test_choose_sees_no_test_samples_and_takes_no_beaten_row(values, policy):
    rows = [{"val_few": few, "val_all": total, "test_few": a, "test_all": b} for few, total, a, b in values]
    chosen = choose(rows, policy, original=rows[0])
    number = next(number for number, row in enumerate(rows) if row is chosen)
    blind = [{"val_few": row["val_few"], "val_all": row["val_all"]} for row in rows]
    assert choose(blind, policy, original=blind[0]) is blind[number]
    if policy != "best_all":
        assert not any(row["val_few"] > chosen["val_few"] and row["val_all"] > chosen["val_all"] for row in rows)
    if policy == "best_few":
        assert chosen["val_all"] >= rows[0]["val_all"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], "best_all"), ValueError, "at least one with val_all"),
        (([{"val_all": math.nan}], "best_all"), ValueError, "at least one with val_all"),
        ((ROWS_TO_CHOOSE, "best_test"), ValueError, "policy must be one of"),
        ((ROWS_TO_CHOOSE, "best_few"), ValueError, "original must be given"),
        ((ROWS_TO_CHOOSE, "knee", 1.0), ValueError, "max_drop goes with policy 'best_few'"),
        (([{"val_all": 0.5, "val_few": None}], "knee"), ValueError, "val_few"),
        ((ROWS_TO_CHOOSE, "best_few", -1.0), ValueError, "max_drop must be"),
    ],
)
def test_choose_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        choose(*arguments)


# Rows and plans


CELL = {
    "experiment": st.sampled_from(["gamma", "compare"]),
    "method": st.sampled_from(["Alpha Net", "ncm"]),
    "classifier": st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    "error": st.none() | st.sampled_from(['a "quoted", text', "two\nlines"]),
    "seed": st.none() | st.integers(0, 2**63),
    "shared": st.none() | st.booleans(),
    "gamma": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "test_all": st.none() | st.floats(0, 1),
}


@given(st.lists(st.fixed_dictionaries(CELL), max_size=4))
def test_csv_round_trip(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    rows = [make_row(**each) for each in values]
    write_rows(rows, path)
    assert read_rows(path) == rows


def test_csv_errors(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    with pytest.raises(
        ValueError, match="is not a study's results: line 1: its columns must be experiment, .* they differ in a, augment, "
    ):
        read_rows(path)
    write_rows([make_row(experiment="gamma", method="Alpha Net", gamma=0.5)], path)
    path.write_text(path.read_text().replace("0.5", "half"))
    with pytest.raises(ValueError, match="line 2: gamma must be a number, got 'half'"):
        read_rows(path)
    with pytest.raises(TypeError, match="no column 'gammas'"):
        make_row(gammas=1)


def test_no_two_rows_have_one_key(study):
    rows = read_rows(study[0] / ROWS)
    assert len({row_key(row) for row in rows}) == len(rows)


def test_plan_shares_trainings():
    trials = plan(StudyOptions(forms=["plain"]))
    trainings = {trial.training for trial in trials}
    assert len(trainings) < 0.7 * len(trials)
    assert {trial.experiment for trial in trials} == {*EXPERIMENTS, "candidates"} - {"compare"}


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("experiments", ["gama"], ValueError, "experiments must be one of gamma, top-k"),
        ("experiments", "gamma", TypeError, "experiments must be a list"),
        ("gammas", [], ValueError, "gammas must be given at least one value"),
        ("gammas", [1.5], ValueError, "gammas must be finite and above 0 and at most 1, got 1.5"),
        ("seeds", 0, ValueError, "seeds must be"),
        ("few_samples", [0], ValueError, "few_samples must be"),
        ("policy", "best", ValueError, "policy must be one of"),
        ("max_drop", 1.0, ValueError, "max_drop goes with"),
        ("lr", -1.0, ValueError, "lr must be"),
    ],
)
def test_bad_options(option, value, error, message):
    with pytest.raises(error, match=message):
        StudyOptions(**{option: value})


def test_summary_counts_seeds():
    rows = [make_row(experiment="original", method="original", test_few=0.0, test_all=0.5)]
    rows += [
        make_row(experiment="gamma", method="m", seed=seed, gamma=g, test_few=g, test_all=g)
        for seed in (0, 1)
        for g in (0.5, 1.0)
    ]
    assert [(entry["configuration"], entry["seeds"], entry["all_gain"]) for entry in summarize(rows)[1:]] == [
        ({"gamma": 0.5}, 2, 0.0),
        ({"gamma": 1.0}, 2, 0.5),
    ]


# The command


def test_command(problem, tmp_path, capsys):
    features, linear = problem
    save_linear(linear, tmp_path / "linear.pth")
    command = Study(
        features=features, classifier=tmp_path / "linear.pth", output=tmp_path / "study", device="cpu", progress=False, seeds=2,
        experiments=("negatives", "compare"), gammas=(0.7, 1.0), negative_ratios=(0.0, 1.0), top_k=2, epochs=1, **SPLIT,
    )  # fmt: skip
    console = Console(width=160, record=True, quiet=False)
    result = command.run(console)
    text = console.export_text()
    assert "negatives: base samples for each few sample" in text and "Alpha Net, paper's form" in text and "±" in text
    json.dumps(result, allow_nan=False)
    assert values_of(read_rows(tmp_path / "study" / ROWS), "classifier") == {"linear"}


def test_command_errors(problem, tmp_path):
    features, linear = problem
    save_linear(linear, tmp_path / "linear.pth")
    given_ = {"classifier": tmp_path / "linear.pth", "output": tmp_path / "study", "device": "cpu"}
    with pytest.raises(ValueError, match="experiments must be one of"):
        Study(features=features, experiments=("all",), **given_)
    with pytest.raises(FileNotFoundError, match="features of train"):
        Study(features=tmp_path, **given_).run()
    with pytest.raises(ValueError, match="must have few and base classes"):
        Study(features=features, few_below=1, **given_).run()
    assert not (tmp_path / "study").exists()
