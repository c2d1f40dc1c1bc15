"""A study: every experiment of the paper on cached features, with several seeds, into one table.

What is trained is in :mod:`alphaext.study.plans`, the table in :mod:`alphaext.study.rows`. Whatever is chosen is chosen on
validation samples; each result is measured on validation and on test samples.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import ClassSplit, split_classes
from ..features.store import Features, as_json, differences, read_parts
from ..metrics.accuracy import SPLITS
from ..utils.checks import check_integer, if_given
from ..utils.environment import versions
from ..utils.files import PathLike, check_no_file, folder_lock, read_json, write_json
from ..utils.linear import linear_parameters, make_linear
from ..utils.tensors import TensorLike, check_whole, class_ids, tensor_digest
from .plans import EXPERIMENTS, StudyOptions
from .rivals import Rivals
from .rows import ResultsFile, row_key, summarize
from .trials import CHECKPOINTS, Problem, Trainings

RESULTS, ROWS, CLASSES, CONFUSIONS = "results.json", "results.csv", "classes.csv", "confusions.csv"
FORMAT = "alphaext study 1"


def run_study(
    features: PathLike,
    linear: nn.Module,
    output: PathLike,
    options: StudyOptions | None = None,
    *,
    classifier_name: str = "classifier",
    few_below: int = 20,
    many_above: int = 100,
    few_classes: TensorLike | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    attribution: str | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Run the paper's experiments on a trained classifier and cached features.

    The folder ``output`` gets ``results.csv``, a row for each head or rival and seed
    (:data:`alphaext.study.rows.COLUMNS`); ``results.json``, what it was made of, and what was chosen of what; and, with the
    experiment "compare", ``classes.csv`` and ``confusions.csv``: what became of each class under the chosen Alpha Net of the
    first seed (:func:`alphaext.metrics.class_table`), and which confusions it mends and makes
    (:mod:`alphaext.metrics.confusions`).

    An interrupted study goes on where it stopped when it is run again, to the same rows but for ``seconds``, which are then
    those of the last run. More experiments and seeds may be asked for later; the rows that are there stay. Trainings that
    several experiments ask for are run once, and all that see the same samples share their logits (:func:`alphaext.fit_many`).

    Args:
        features: the folder of cached features, with ``train``, ``val`` and ``test`` in it, as ``alphaext extract`` writes it.
        linear: the trained classifier, such as ``nn.Linear``; on a GPU, the study runs there.
        output: a new folder, an empty one, or one of the same study.
        options: which experiments, seeds and settings; default all of the paper's.
        classifier_name: what the classifier is called in the results.
        few_below: a class with fewer training images is few; 20 in the paper.
        many_above: a class with more training images is many; 100 in the paper.
        few_classes: ids of the few classes, however many images they have, instead of ``few_below``; or names, where the
            features have such.
        jobs: trainings at a time; default one a core.
        overwrite: start anew where there are results already.
        attribution: a text that goes into ``results.json``, such as the data set's licence.
        progress: show progress bars; None shows them where standard error is a terminal.

    Returns:
        What ``results.json`` holds: ``identity``, ``versions``, ``machine``, ``options``, ``experiments`` (those that are
        complete), ``choices``, and ``summary`` (:func:`alphaext.study.summarize`), among others.

    Raises:
        FileNotFoundError: no features of one of the three parts.
        TypeError, ValueError: arguments out of range, features that do not belong together or to the classifier, results of
            another study in the folder; before any work.
        KeyboardInterrupt: passed on; what was done is kept.

    Example:
        >>> import tempfile
        >>> folder, labels = tempfile.mkdtemp(), torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
        >>> for part in ("train", "val", "test"):
        ...     _ = write_features(f"{folder}/{part}", torch.randn(95, 8), labels, num_classes=4)
        >>> options = StudyOptions(experiments=["top-k"], top_ks=[1, 2], fixed_gammas=[1.0], epochs=2, seeds=2)
        >>> results = run_study(folder, nn.Linear(8, 4), f"{folder}/study", options, many_above=20)
        >>> [(entry["method"], entry["configuration"], entry["seeds"]) for entry in results["summary"]]
        [('original', {}, 1), ('Alpha Net, preset few', {'top_k': 1}, 2), ('Alpha Net, preset few', {'top_k': 2}, 2)]
    """
    settings = options if options is not None else StudyOptions()
    if_given(check_integer, jobs, "jobs", minimum=1)
    parts = read_parts(features, "train", "val", "test")
    weight, bias = linear_parameters(linear)
    train = parts["train"]
    if tuple(weight.shape) != (train.num_classes, train.features.shape[1]):
        raise ValueError(
            f"linear must have weight {[train.num_classes, train.features.shape[1]]} for these features, got "
            f"{list(weight.shape)}"
        )
    for part in parts.values():
        check_whole(part.features)
    split = split_classes(train.class_counts(), few_below=few_below, many_above=many_above)
    if few_classes is not None:
        few = class_ids(few_classes, train.num_classes, "few_classes", train.class_names)
        split = ClassSplit.of_few(few, train.class_counts(), many_above)
    if not len(split.few) or not len(split.base):
        raise ValueError(f"the training features must have few and base classes, got {split!r}")
    identity = _identity_of(parts, weight, bias, few_below, many_above, settings)
    if few_classes is not None:
        identity |= {"few_below": None, "few_classes": split.few.tolist()}
    folder = Path(output)
    earlier = _check_output(folder, identity, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, "a study"):
        if earlier is None:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        # Classes and confusions are of the first form's head; others are made anew.
        same_form = earlier is not None and earlier["options"]["forms"][:1] == list(settings.forms[:1])
        outdated = () if same_form else (CLASSES, CONFUSIONS)
        for name in (RESULTS, ROWS, CLASSES, CONFUSIONS) if earlier is None else outdated:
            (folder / name).unlink(missing_ok=True)
        file = ResultsFile(folder / ROWS)
        name = classifier_name or "classifier"
        problem = Problem(settings, make_linear(weight, bias), parts, split, name, file, progress)
        results = {
            "identity": identity,
            "classifier": name,
            "features": os.fspath(features),
            "samples": {part: len(entry) for part, entry in parts.items()},
            "classes": {part: len(getattr(split, part)) for part in SPLITS},
            "versions": versions("python", "alphaext", "torch", "numpy", "scikit-learn"),
            "machine": _machine(weight.device),
            "options": asdict(settings),
            "attribution": attribution if attribution is not None else (earlier or {}).get("attribution"),
            "experiments": (earlier or {}).get("experiments", []),
            "choices": (earlier or {}).get("choices", []),
        }
        # Written before there are results: it says whose they will be.
        write_json(folder / RESULTS, results)
        trainings = Trainings(problem, folder, jobs)
        try:
            results["choices"] = _run_experiments(problem, trainings, folder, results["choices"])
        finally:
            file.write()
        done = {*results["experiments"], *settings.experiments}
        rows = file.in_order()
        results |= {
            "experiments": [name for name in EXPERIMENTS if name in done],
            "rows": len(rows),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "summary": summarize(rows),
        }
        write_json(folder / RESULTS, results)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return results


def _identity_of(
    parts: Mapping[str, Features],
    weight: Tensor,
    bias: Tensor | None,
    few_below: int,
    many_above: int,
    settings: StudyOptions,
) -> dict[str, Any]:
    """What must be equal for a study to go on."""
    identity = {
        "format": FORMAT,
        "features": {
            part: {
                "features_sha256": entry.metadata["features_sha256"],
                "labels_sha256": tensor_digest([entry.labels]),
                "passes": entry.passes,
            }
            for part, entry in parts.items()
        },
        "classifier": tensor_digest([weight] if bias is None else [weight, bias]),
        "few_below": few_below,
        "many_above": many_above,
        "options": settings.identity(),
    }
    return as_json(identity, "the study")


def _run_experiments(
    problem: Problem, trainings: Trainings, folder: Path, choices: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Add all rows to the problem's file; returns what was chosen, for other seeds' ``choices`` as they were."""
    settings = problem.options
    problem.measure_original()
    trainings.run()
    if "compare" in settings.experiments:
        seeds = (None, *settings.seed_values())
        of_other_seeds = [choice for choice in choices if choice["seed"] not in seeds]
        choices = Rivals(problem, trainings).run(folder / CLASSES, folder / CONFUSIONS) + of_other_seeds
    problem.file.arrange(row_key(trainings.row(trial)) for trial in trainings.trials)
    return choices


def _check_output(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What ``results.json`` says where the folder is of the same study and goes on; None where it begins."""
    check_no_file(folder, "output")
    there = [name for name in (RESULTS, ROWS, CLASSES, CONFUSIONS) if (folder / name).exists()]
    if overwrite or not there:
        return None
    advice = "give another folder, or overwrite it (--overwrite)"
    if RESULTS not in there:
        raise ValueError(f"output must be a new folder or one of the same study, {str(folder)!r} has {there[0]}; {advice}")
    earlier = read_json(folder / RESULTS, "a study's results")
    own = earlier.get("identity")
    if own == identity:
        if not _can_go_on_from(earlier):
            raise ValueError(f"{str(folder / RESULTS)!r} is damaged: options, experiments or choices are none; {advice}")
        return earlier
    found = differences(identity, own) if isinstance(own, Mapping) else ["it says not of which"]
    raise ValueError(f"output {str(folder)!r} holds another study: {'; '.join(found[:3])}; {advice}")


def _can_go_on_from(earlier: Mapping[str, Any]) -> bool:
    """Whether what a study goes on with is as it was written."""
    options, done, choices = (earlier.get(name) for name in ("options", "experiments", "choices"))
    if not isinstance(options, Mapping) or not isinstance(options.get("forms"), list):
        return False
    if not isinstance(done, list) or not all(isinstance(name, str) and name in EXPERIMENTS for name in done):
        return False
    return isinstance(choices, list) and all(
        isinstance(each, Mapping) and isinstance(each.get("seed"), int | None) for each in choices
    )


def _machine(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"platform": platform.platform(), "processors": os.cpu_count(), "device": str(device), "gpu": gpu}
