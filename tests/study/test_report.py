"""A report of a small study: what it shows is what the study's files say, and it needs nothing but itself."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re
import shutil
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from alphaext import AlphaNet, ClassSplit, fit
from alphaext.features import write_features
from alphaext.metrics.class_table import read_class_table, write_class_table
from alphaext.study.plans import EXPERIMENTS, StudyOptions
from alphaext.study.report.advice import advice_blocks
from alphaext.study.report.data import StudyFiles, read_studies, read_study
from alphaext.study.report.figures import rank_correlation
from alphaext.study.report.front import Front, Height, apart, better_rivals, chosen_heights, crowd, read_front, verdict
from alphaext.study.report.page import markdown_text
from alphaext.study.report.write import write_report
from alphaext.study.rows import COLUMNS, group_rows, make_row, read_rows, write_rows
from alphaext.study.run import CLASSES, CONFUSIONS, RESULTS, ROWS, run_study
from alphaext.training.result import history_html, plot_history
from alphaext.utils.figures import clean_text
from alphaext.utils.text import percent

pytest.importorskip("matplotlib")

COUNTS = [60, 50, 40, 30, 25, 9, 7, 5]
NAMES = [
    "<script>alert(1)</script>",
    "a\nb",
    "🦄",
    "שלום",
    "x" * 200,
    'quote " & <b>',
    "$\\alpha$ \u202e\x07",
    "javascript:x, b | c",
]
ATTRIBUTION = 'Drawings <img src="http://example.invalid/x.png"> & others, CC BY 4.0'
OPTIONS = StudyOptions(
    seeds=2,
    gammas=[0.5, 1.0],
    fixed_gammas=[1.0],
    top_ks=[1, 2],
    few_samples=[1],
    negative_ratios=[0, 1],
    top_k=2,
    epochs=2,
    pca_dim=4,
    retraining_epochs=1,
    retraining_lrs=[0.1],
)
VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """The folder of a whole study, of classes with odd names. Not to be changed."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("study")
    centres = 1.2 * torch.randn(8, 6, generator=generator)
    for part, counts in (("train", COUNTS), ("val", [12] * 8), ("test", [15] * 8)):
        labels = torch.arange(8).repeat_interleave(torch.tensor(counts))
        features = centres[labels] + torch.randn(len(labels), 6, generator=generator)
        write_features(folder / part, features, labels, num_classes=8, class_names=NAMES)
    linear = nn.Linear(6, 8)
    linear.weight.data.copy_(centres)
    linear.bias.data.copy_(-centres.square().sum(dim=1) / 2 + torch.tensor(COUNTS).log())
    settings = {"few_below": 10, "many_above": 35, "attribution": ATTRIBUTION, "classifier_name": "<i>joint</i>"}
    run_study(folder, linear, folder / "study", OPTIONS, progress=False, jobs=1, **settings)
    return folder / "study"


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    """The report of that study. Not to be changed."""
    return write_report(study, tmp_path_factory.mktemp("report") / "report")


def page_of(files) -> str:
    return files.html.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that elements close in order, and gathers ids, references, tables and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self._seen(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = []

    def handle_startendtag(self, tag, attributes):
        self._seen(tag, attributes)

    def _seen(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.references.append((tag, name, value))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag
        if tag in ("td", "th"):
            self.tables[-1][-1].append("".join(self.cell or []))
            self.cell = None

    def handle_data(self, text):
        self.texts.append(text)
        if self.cell is not None:
            self.cell.append(text)

    def table(self, *header: str) -> list[dict[str, str]]:
        """The rows of the first table that begins with these columns, by column."""
        for lines in self.tables:
            if tuple(lines[0][: len(header)]) == header:
                return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
        raise AssertionError(f"no table begins with {header}: {[lines[0][:4] for lines in self.tables]}")


def change_rows(folder: Path, change) -> None:
    """Rewrite the rows of a copied study."""
    write_rows(change(read_rows(folder / ROWS)), folder / ROWS)


def copied(study: Path, folder: Path, *, rows=None, info=None, without: tuple[str, ...] = ()) -> Path:
    """A copy of the study with other rows or another results.json."""
    shutil.copytree(study, folder)
    for name in without:
        (folder / name).unlink()
    if rows is not None:
        change_rows(folder, rows)
    if info is not None:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        info(found)
        (folder / RESULTS).write_text(json.dumps(found), encoding="utf-8")
    return folder


def few_rows(rows):
    """What makes a small and quick report."""
    return [row for row in rows if row["experiment"] in ("original", "rule")]


def test_the_page_is_whole_and_asks_for_nothing(report):
    text = page_of(report)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and len(page.ids) > 50
    for tag, name, value in page.references:
        assert value.startswith("#") and name == "href" and tag in ("a", "use"), (tag, name, value)
        assert value[1:] in page.ids
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#") and target[1:] in page.ids
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "image", "foreignobject", "style2"}
    assert "@import" not in text and "<?xml" not in text and "xmlns" not in text
    assert sum(tag == "style" for tag, _ in page.elements) == 1
    assert "default-src 'none'" in text


def test_names_and_texts_are_shown_as_text(report):
    text = page_of(report)
    page = Page(text)
    assert "<script" not in text and "<img" not in text and "<i>joint" not in text
    assert "\u202e" not in text and "\x07" not in text
    shown = "".join(page.texts)
    for name in NAMES[5:]:
        assert clean_text(name) in shown
    assert any(cell == clean_text(NAMES[6]) for lines in page.tables for line in lines for cell in line)
    assert "<bdi>" in text
    assert "<i>joint</i>" in shown
    markdown = report.tables.read_text(encoding="utf-8")
    assert "<script" not in markdown and markdown_text(NAMES[7]) in markdown and "x, b \\| c" in markdown
    body = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(body) > 50
    # Every line of a table has as many cells as the one above it.
    lines = markdown.splitlines()
    for above, line in itertools.pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", above)) == len(re.split(r"(?<!\\)\|", line))


def test_the_attribution_is_under_every_figure_and_at_the_foot(report):
    page = Page(page_of(report))
    figures = sum(tag == "figure" for tag, _ in page.elements)
    assert "".join(page.texts).count(clean_text(ATTRIBUTION)) == figures + 1
    svg = next(path for path in report.figures if path.suffix == ".svg").read_text(encoding="utf-8")
    assert "CC BY 4.0" in svg and "<img" not in svg


def test_every_experiment_has_its_section_figures_and_numbers(report):
    page = Page(page_of(report))
    headings = "".join(page.texts)
    for name in EXPERIMENTS:
        assert name in headings
    stems = {path.stem for path in report.figures}
    wanted = ("trade-off-front", "above-the-front", "class-gains", "gain-by-distance", "gain-histogram", "gamma-accuracy-top-1")
    wanted += ("gamma-gain-top-5", "top-k-top-1", "pool-few-top-5", "sharing-few-top-1", "negatives-top-1", "rule", "start")
    for name in (*wanted, "controls", "data-size-top-1"):
        assert any(stem.startswith(name) for stem in stems), name
    assert next(path.stem for path in report.figures).startswith("trade-off-front")
    assert headings.index("What to take for these data") < headings.index("The trade-off front")
    plots = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(plots) == len(stems) and all(len(plot["aria-label"]) > 10 and plot["role"] == "img" for plot in plots)
    assert sum(tag == "details" for tag, _ in page.elements) >= sum(tag == "figure" for tag, _ in page.elements)


def test_the_figures_are_whole_files(report):
    for path in report.figures:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG") and content.rstrip().endswith(b"IEND\xaeB`\x82")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")


def mean_and_spread(rows, name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    factor = {1: 0.0, 2: 12.7062047364}[len(values)] / len(values) ** 0.5  # Student's t
    spread = f" ±{percent(factor * statistics.stdev(values))}" if len(values) > 1 else ""
    return percent(statistics.fmean(values)) + spread if values else "-"


def test_the_comparison_has_the_numbers_of_the_rows(report, study):
    shown = Page(page_of(report)).table("method", "chosen on validation")
    rows = [row for row in read_rows(study / ROWS) if row["experiment"] == "compare"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    assert [line["method"] for line in shown] == methods
    for line, method in zip(shown, methods, strict=True):
        own = [row for row in rows if row["method"] == method]
        for part in ("few", "medium", "many", "all"):
            assert line[f"{part} top-1"] == mean_and_spread(own, f"test_{part}")
            assert line[f"{part} top-5"] == mean_and_spread(own, f"test_{part}_top5")
        gammas = [f"{row['gamma']:g}" for row in own if row["gamma"] is not None]
        assert line["candidates"] == "1" or all(gamma in line["chosen on validation"] for gamma in gammas)
    errors = Page(page_of(report)).table("method", "few", "medium")
    assert errors[0]["few"] == mean_and_spread(rows[:1], "test_few_calibration_error")


@pytest.mark.parametrize(
    ("experiment", "column", "show"),
    [
        ("gamma", "gamma", "{:g}".format),
        ("top-k", "top_k", str),
        ("pool", "pool", str),
        ("negatives", "negative_ratio", "{:g}".format),
        ("data-size", "few_samples", lambda value: "all" if value is None else str(value)),
    ],
)
def test_the_tables_of_experiments_have_the_numbers_of_the_rows(report, study, experiment, column, show):
    rows = [row for row in read_rows(study / ROWS) if row["experiment"] == experiment]
    original = next(row for row in read_rows(study / ROWS) if row["experiment"] == "original")
    values = {row[column] for row in rows}
    table = Page(page_of(report)).table("method", *(["gamma", "top_k"] if experiment == "pool" else []), column)
    for value in values:
        own = [row for row in rows if row[column] == value and (experiment != "pool" or row["gamma"] == 1.0)]
        lines = [line for line in table if line[column] == show(value) and (experiment != "pool" or line["gamma"] == "1")]
        assert len(lines) == 1
        assert lines[0]["few top-1"] == mean_and_spread(own, "test_few")
        assert lines[0]["all top-5"] == mean_and_spread(own, "test_all_top5")
        gain = statistics.fmean(row["test_few"] for row in own) - original["test_few"]
        assert lines[0]["few gain"].split(" ")[0] == percent(gain, sign=True)


def test_classes_have_their_alphas_and_neighbours(report, study):
    classes = sorted(
        (row for row in read_class_table(study / CLASSES) if row.split == "few"), key=lambda r: (-r.gain, r.class_id)
    )
    table = Page(page_of(report)).table("class", "training images", "before, %")
    assert [line["class"] for line in table] == [clean_text(row.name) for row in classes]
    for line, row in zip(table, classes, strict=True):
        assert (line["before, %"], line["after, %"]) == (percent(row.accuracy_before), percent(row.accuracy_after))
        assert line["own alpha"] == f"{row.own_alpha:.2f}"
        for k, (alpha, name) in enumerate(zip(row.alphas, row.neighbor_names, strict=True), 1):
            assert line[f"NN{k}"] == f"{alpha:.2f} {clean_text(name)}"


def test_confusions_have_their_totals(report, study):
    with (study / CONFUSIONS).open(newline="", encoding="utf-8") as file:
        totals = [row for row in csv.DictReader(file) if not row["true_class"]]
    table = Page(page_of(report)).table("right class", "taken for", "before", "after", "mended")
    assert [(line["before"], line["new"]) for line in table[:-1]] == [(row["before"], row["new"]) for row in totals]
    assert table[-1]["after"] == str(sum(int(row["after"]) for row in totals))


def test_heights_above_the_front_are_what_the_rows_say(report, study):
    rows = read_rows(study / ROWS)
    front = [row for row in rows if row["experiment"] == "few-bias-front" or row["method"] in ("original", "few-bias")]
    best = {}
    for row in front:
        best[row["test_few"]] = max(row["test_all"], best.get(row["test_few"], 0))
    few = sorted(best)
    table = Page(page_of(report)).table("method", "few, %", "all, %")
    for line in table:
        own = [row for row in rows if row["experiment"] == "compare" and row["method"] == line["method"]]
        heights = [row["test_all"] - np.interp(row["test_few"], few, [best[value] for value in few]) for row in own]
        assert line["each seed"] == ", ".join(percent(height, sign=True) for height in heights)
        assert line["above the front, points"].split(" ")[0] == percent(statistics.fmean(heights), sign=True)
    heads = {row["method"] for row in rows if row["experiment"] == "compare" and row["top_k"] is not None}
    assert {line["method"] for line in table} == heads and len(report.findings) == 1 + len(heads) >= 3


def test_what_lies_beyond_the_front_is_told_by_its_end():
    (group,) = group_rows([make_row(method="A", test_few=0.5, test_all=0.4)])
    said = verdict(Height(group, (None,)), "A", 500, front=Front(few=(0.1, 0.3), total=(0.5, 0.2), constants=2))
    assert "its few accuracy, 50.0% with 40.0% over all; the largest is 30.0% with 20.0% over all" in said
    assert said.startswith("A lies above the front's end")
    below = verdict(Height(group, (None,)), "A", 500, front=Front(few=(0.1, 0.3), total=(0.5, 0.45), constants=2))
    assert below.startswith("A cannot be compared with the front")


def test_the_front_is_interpolated_between_its_constants_and_not_beyond():
    front = Front(few=(0.1, 0.2, 0.4), total=(0.5, 0.6, 0.2), constants=3)
    assert front.all_at(0.1) == 0.5 and front.all_at(0.3) == pytest.approx(0.4) and front.all_at(0.4) == 0.2
    assert front.all_at(0.05) is None and front.all_at(0.41) is None


@pytest.mark.parametrize(
    ("heights", "words"),
    [
        ((-0.02, -0.021), "lies below the front: one constant on the few logits does better, by 2.1 points"),
        ((-0.02, -0.021), "(95% interval 1.4 to 2.7, 2 seeds, 10 of 500 test samples)"),
        ((0.02, 0.021), "lies above the front: 2.1 points more"),
        (
            (0.02, 0.03),
            "is not told from the front: +2.5 points over all at equal few accuracy (95% interval -3.9 to +8.9, 2 seeds)",
        ),
        ((0.0001,), "is not told from the front: 0.0 points over all at equal few accuracy (one seed, no interval)"),
        ((-0.01,), "by 1.0 points over all at equal few accuracy (one seed, no interval, 5 of 500 test samples)"),
        ((None,), "cannot be compared with the front"),
        ((-0.01, None), "1 of 2 seeds lie beyond the front's ends"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(heights, words):
    rows = tuple(make_row(method="A", test_few=0.5, test_all=0.5) for _ in heights)
    (group,) = group_rows(rows)
    assert words in verdict(Height(group, heights), "A", 500)


def test_a_verdict_says_when_nothing_changed_and_who_is_better():
    row = make_row(method="A", test_few=0.5, test_all=0.5)
    (group,) = group_rows([row])
    assert "changes nothing" in verdict(Height(group, (0.0,)), "A", 500, row)
    others = group_rows([make_row(method=m, test_few=f, test_all=a) for m, f, a in (("B", 0.6, 0.6), ("C", 0.6, 0.4))])
    (sentence,) = better_rivals(group, others)
    assert "B (few 60.0%, all 60.0%)" in sentence and "C" not in sentence
    assert better_rivals(group, others[1:]) == []


def studied(*rows, samples: int = 1000) -> StudyFiles:
    """A study of one classifier with these results of "compare", the first one's the original's."""
    made = [make_row(experiment="compare", **row) for row in rows]
    info = {"samples": {"val": samples, "test": samples}}
    return StudyFiles(Path(), "joint", "study", (dict(made[0], experiment="original"), *made), info)


BEFORE = {"method": "original", "val_all": 0.5, "test_few": 0.1, "test_many": 0.8, "test_all": 0.5}


def test_the_advice_is_what_validation_samples_say_and_tells_what_it_costs():
    rows = [
        {"method": "Alpha Net, preset few", "seed": seed, "val_all": 0.56, "test_few": few, "test_many": 0.79, "test_all": 0.6}
        for seed, few in enumerate((0.4, 0.41, 0.42))
    ]
    best = {"method": "crt", "val_all": 0.6, "test_few": 0.2, "test_many": 0.81, "test_all": 0.6}
    control = {"method": "free rows", "val_all": 0.9, "test_few": 0.9, "test_many": 0.9, "test_all": 0.9}
    advice, note = advice_blocks([studied(BEFORE, *rows, best, control)])
    assert advice.text.startswith(
        "Take crt (alphaext baseline crt). Of 3 methods it has the most: 60.0% over all on validation"
    )
    assert "On test samples: few +10.0 points, many +1.0, all +10.0. No loss of base classes is seen." in advice.text
    few = "take Alpha Net, preset few (alphaext fit --preset few). On test samples: few +31.0 points (+28.5 to +33.5), all"
    assert few in advice.text and "Base classes pay: many -1.0 (-1.0 to -1.0)." in advice.text
    assert "Another 1,000 test samples would move an accuracy over all by up to 3.1 points" in note.text


def test_of_methods_that_are_alike_the_advice_is_the_one_that_changes_less():
    constant = {"method": "few-bias", "val_all": 0.55, "test_few": 0.3, "test_many": 0.75, "test_all": 0.55}
    best = {"method": "crt", "val_all": 0.555, "test_few": 0.3, "test_many": 0.8, "test_all": 0.55}
    (advice, _) = advice_blocks([studied(BEFORE, best, constant)])
    assert advice.text.startswith("Take few-bias (") and "crt has 0.5 points more, which is within the noise" in advice.text
    (advice, _) = advice_blocks([studied(BEFORE, {**best, "val_all": 0.505})])
    assert advice.text.startswith("Take original (nothing is to be done). It has 50.0%")
    assert advice_blocks([studied(BEFORE, samples=0)]) == []


def test_a_crowd_is_boxed_and_nobody_else():
    apart = np.array([[0.0, 0.0], [10.0, 10.0], [20.0, 5.0]])
    assert crowd(apart, 0) is None
    (left, right), (low, high) = crowd(np.vstack([apart, [[10.2, 10.1], [10.1, 10.3]]]), 0)
    assert 9 < left < 10 and 10.2 < right < 11 and 9 < low < 10 and 10.3 < high < 11
    assert crowd(np.vstack([apart, apart[:1], apart[:1], apart]), 5) is None  # small points count for nothing


def test_names_that_crowd_are_moved_apart_and_stay_in_order():
    wanted = np.sort(np.random.default_rng(0).random(8) / 20 + 0.95)
    at = apart(wanted, 0.1)
    assert np.diff(at).min() > 0.0999 and at.min() >= 0 and at.max() <= 1
    assert np.diff(apart(wanted.repeat(4), 0.1)).min() == pytest.approx(1 / 32)  # so many have no room


def test_the_same_study_makes_the_same_bytes_and_leaves_matplotlib_as_it_was(study, tmp_path, monkeypatch):
    import matplotlib

    small = copied(study, tmp_path / "small", rows=few_rows)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # which would be an error to import
    first = write_report(small, tmp_path / "one")
    # Of all settings but the backend, whose look-up imports pyplot.
    names = [name for name in matplotlib.rcParams if name != "backend"]
    before = {name: matplotlib.rcParams[name] for name in names}
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        second = write_report(small, tmp_path / "two")
    assert {name: matplotlib.rcParams[name] for name in names} == before
    assert page_of(first) == page_of(second) and len(first.figures) == len(second.figures) > 4
    for one, two in zip(first.figures, second.figures, strict=True):
        assert one.name == two.name and one.read_bytes() == two.read_bytes()
    assert first.tables.read_bytes() == second.tables.read_bytes()


def test_several_studies_stand_side_by_side(study, tmp_path):
    other = copied(study, tmp_path / "other", rows=lambda rows: [row for row in rows if row["experiment"] in KEPT])
    files = write_report([other, copied(other, tmp_path / "third", without=(CLASSES, CONFUSIONS))], tmp_path / "report")
    page = Page(page_of(files))
    assert len(page.ids) == len(set(page.ids))
    compared = page.table("method", "classifier", "chosen on validation")
    names = [study.name for study in read_studies([tmp_path / "other", tmp_path / "third"])]
    assert set(names) == {"<i>joint</i> (other)", "<i>joint</i> (third)"} == {line["classifier"] for line in compared}
    assert len([path for path in files.figures if path.stem.startswith("trade-off-front")]) == 4
    assert len(files.findings) % 2 == 0 and "(third)" in files.findings[-1]
    assert files.findings[1].startswith("<i>joint</i> (third): take ")
    with pytest.raises(ValueError, match="study must name each folder once"):
        write_report([other, f"{other}/"], tmp_path / "again")


KEPT = ("original", "compare", "few-bias-front", "candidates")


def one_seed(rows):
    return [row for row in rows if row["seed"] in (None, 0)]


def without_few(rows):
    return [
        {name: None if name.startswith(("val_few", "test_few")) else value for name, value in row.items()}
        for row in rows
        if row["experiment"] in (*KEPT, "pool", "negatives")
    ]


def without_original(rows):
    return [row for row in rows if row["experiment"] in ("gamma", "controls")]


def with_an_unknown_experiment(rows):
    start = [row for row in rows if row["experiment"] == "start"]
    names = ("other <b>", "שלום", "🦄")
    odd = [{**row, "experiment": name, "method": f"{row['method']} <b>"} for name in names for row in start]
    return [row for row in rows if row["experiment"] == "original"] + odd


def all_failed(rows):
    found = []
    for row in rows:
        if row["experiment"] == "gamma":
            row = {name: None if name.startswith(("val_", "test_")) else value for name, value in row.items()}
            found.append({**row, "error": "diverged <b>"})
    return found


def nothing_but_the_original(rows):
    return [row for row in rows if row["experiment"] == "original"]


@pytest.mark.parametrize(
    ("rows", "without", "words"),
    [
        (lambda rows: one_seed([row for row in rows if row["experiment"] in KEPT]), (CLASSES,), "one seed"),
        (without_few, (CLASSES,), "There are no test samples of few classes"),
        (without_original, (CLASSES, CONFUSIONS), "The front was not measured: it comes with the experiment compare"),
        (with_an_unknown_experiment, (CLASSES, CONFUSIONS), "other <b>"),
        (all_failed, (CONFUSIONS,), "diverged <b>"),
        (nothing_but_the_original, (CLASSES, CONFUSIONS), "Not in this study: gamma"),
    ],
)
def test_parts_that_are_missing_are_named_and_stop_nothing(study, tmp_path, rows, without, words):
    folder = copied(study, tmp_path / "study", rows=rows, without=without)
    files = write_report(folder, tmp_path / "report")
    text = page_of(files)
    page = Page(text)
    assert words in "".join(page.texts) and len(page.ids) == len(set(page.ids))
    experiments = {row["experiment"] for row in read_rows(folder / ROWS)}
    stems = [path.stem for path in files.figures if path.suffix == ".png"]
    assert len(stems) == len(set(stems)) == sum(tag == "svg" for tag, _ in page.elements)
    missing = next((text for text in page.texts if text.startswith("Not in this study:")), "")
    for name in EXPERIMENTS:
        assert (f"{name} (" in missing) == (name not in experiments)


def test_an_unfinished_study_says_so(study, tmp_path):
    def change(info):
        for name in ("finished", "attribution", "summary", "choices", "machine", "versions"):
            info.pop(name)

    folder = copied(study, tmp_path / "study", rows=nothing_but_the_original, info=change, without=(CLASSES, CONFUSIONS))
    text = page_of(write_report(folder, tmp_path / "report"))
    assert "This study is not finished" in text and "versions not known" in text


def test_surrogates_and_other_letters_that_no_file_can_hold(study, tmp_path):
    def change(info):
        info["classifier"] = "a\udcff\x00\ufffe$b"
        info["attribution"] = "\ud800"

    folder = copied(study, tmp_path / "study", rows=few_rows, info=change, without=(CLASSES, CONFUSIONS))
    assert "a\ufffd\ufffd\ufffd$b" in page_of(write_report(folder, tmp_path / "report"))


def test_only_its_own_files_are_replaced(study, tmp_path):
    small = copied(study, tmp_path / "small", rows=nothing_but_the_original, without=(CLASSES, CONFUSIONS))
    large = copied(study, tmp_path / "large", rows=few_rows, without=(CLASSES, CONFUSIONS))
    output = tmp_path / "report"
    output.mkdir()
    (output / "tables.md").write_text("mine")
    with pytest.raises(ValueError, match=r"has tables.md, which no report wrote"):
        write_report(small, output)
    assert sorted(path.name for path in output.iterdir() if path.name != ".lock") == ["tables.md"]
    files = write_report(large, output, overwrite=True)
    assert files.figures and all(path.exists() for path in files.figures)
    # A later one replaces what an earlier one wrote, and takes away what it no longer has, but for what was changed.
    files.figures[0].write_bytes(b"mine")
    write_report(small, output)
    assert [path for path in files.figures if path.exists()] == [files.figures[0]]
    (output / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"has report.html"):
        write_report(small, output)
    (output / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="which no report wrote"):
        write_report(small, output)


def test_a_record_that_names_other_files_removes_none(study, tmp_path):
    small = copied(study, tmp_path / "small", rows=nothing_but_the_original, without=(CLASSES, CONFUSIONS))
    write_report(small, tmp_path / "report")
    (tmp_path / "mine").write_text("mine")
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    import hashlib

    record["files"]["../mine"] = record["files"]["figures/../../mine"] = [hashlib.sha256(b"mine").hexdigest()]
    (tmp_path / "report" / "report.json").write_text(json.dumps(record))
    write_report(small, tmp_path / "report")
    assert (tmp_path / "mine").read_text() == "mine"


def broken_cell(column: str, value: str):
    def change(folder: Path) -> None:
        lines = list(csv.reader((folder / ROWS).open(encoding="utf-8", newline="")))
        lines[2][COLUMNS.index(column)] = value
        with (folder / ROWS).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    return change


def broken_info(name: str, value):
    def change(folder: Path) -> None:
        info = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        info[name] = value
        (folder / RESULTS).write_text(json.dumps(info), encoding="utf-8")

    return change


def broken_classes(folder: Path) -> None:
    rows = read_class_table(folder / CLASSES)
    write_class_table([dataclasses.replace(rows[0], split="rare"), *rows[1:]], folder / CLASSES, overwrite=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: (folder / RESULTS).unlink(), FileNotFoundError, "there is no results.json in"),
        (lambda folder: (folder / ROWS).unlink(), FileNotFoundError, "there is no results.csv in"),
        (lambda folder: shutil.rmtree(folder), FileNotFoundError, "there is no folder"),
        (lambda folder: (folder / RESULTS).write_text("{"), ValueError, "is not a study's results"),
        (broken_info("identity", None), ValueError, "'identity'"),
        (broken_info("attribution", 3), ValueError, "'attribution' must be text, got 3"),
        (broken_info("choices", [3]), ValueError, "'choices' must be objects"),
        (broken_cell("test_few", "1.5"), ValueError, "line 3: test_few must be between 0 and 1, got 1.5"),
        (broken_cell("seconds", "inf"), ValueError, "line 3: seconds must be finite"),
        (broken_cell("gamma", "x"), ValueError, "line 3: gamma must be a number, got 'x'"),
        (broken_cell("method", ""), ValueError, "line 3: method is empty"),
        (lambda folder: (folder / ROWS).write_text("a,b\n1,2\n"), ValueError, "they differ in"),
        (lambda folder: (folder / ROWS).write_bytes(b"\xff\xff"), ValueError, "results.csv is not a study's results"),
        (lambda folder: (folder / CLASSES).write_text("a,b\n"), ValueError, "classes.csv' is not a table of classes: line 1"),
        (broken_classes, ValueError, "line 2: split must be one of few, medium, many, empty, got 'rare'"),
        (lambda folder: (folder / CONFUSIONS).write_text("a,b\n"), ValueError, "confusions.csv' is not a table of confusions"),
    ],
)
def test_bad_files_are_told_in_one_line_before_anything_is_written(study, tmp_path, change, error, message):
    folder = copied(study, tmp_path / "study")
    change(folder)
    with pytest.raises(error) as found:
        write_report(folder, tmp_path / "report")
    assert message in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "report").exists()


def test_bad_arguments_are_refused(study, tmp_path):
    with pytest.raises(ValueError, match="study must be at least one folder"):
        write_report([], tmp_path / "report")
    with pytest.raises(TypeError, match="title must be text"):
        write_report(study, tmp_path / "report", title=3)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        write_report(study, tmp_path / "file")


def test_without_matplotlib_the_error_says_how_to_get_it(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install .*matplotlib"):
        write_report(study, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_command_writes_and_tells(study, tmp_path):
    from alphaext.commands.report import Report

    kept = {"rows": lambda rows: [row for row in rows if row["experiment"] in KEPT], "without": (CLASSES, CONFUSIONS)}
    small = copied(study, tmp_path / "small", **kept)
    console = Console(record=True, width=200)
    result = Report(study=small, output=tmp_path / "report", title="<b>Mine").run(console)
    assert Path(result["report"]).is_file() and Path(result["tables"]).is_file() and len(result["findings"]) >= 2
    assert result["findings"][0].startswith("Take ") and result["findings"][0][:20] in console.export_text()
    assert "<title>&lt;b&gt;Mine</title>" in Path(result["report"]).read_text(encoding="utf-8")


def test_the_summary_of_the_study_agrees(study):
    """What the report takes as means is what the study itself wrote as means."""
    read = read_study(study)
    summary = json.loads((study / RESULTS).read_text(encoding="utf-8"))["summary"]
    compare = {entry["method"]: entry for entry in summary if entry["experiment"] == "compare"}
    for group in group_rows(read.of("compare"), by=()):
        assert group.mean("test_few") == pytest.approx(compare[group.method]["few"])
        assert group.spread("test_all") == pytest.approx(compare[group.method]["all_std"])
    front = read_front(read)
    assert front is not None
    for height in chosen_heights(read, front):
        assert compare[height.group.method]["seeds"] == len(height.heights) == OPTIONS.seeds


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(5):
        x, y = generator.integers(0, 6, 30), generator.integers(0, 6, 30)
        assert rank_correlation(x.tolist(), y.tolist()) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None


@pytest.fixture(scope="module")
def training():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 8, generator=generator), torch.arange(60) % 4
    head = AlphaNet.from_linear(nn.Linear(8, 4), members=[[3, 0, 1]], gamma=0.5, seed=0)
    given = {"epochs": 3, "progress": False}
    plain = fit(head, features, labels, **given)
    head = AlphaNet.from_linear(nn.Linear(8, 4), members=[[3, 0, 1]], gamma=0.5, seed=0)
    return plain, fit(head, features, labels, val_features=features, val_labels=labels, **given)


def test_a_training_as_a_figure(training):
    plain, validated = training
    assert [axes.get_ylabel() for axes in plot_history(plain).axes] == ["loss"]
    loss, accuracy = plot_history(validated).axes
    few = next(line for line in accuracy.get_lines() if line.get_label() == "few")
    assert few.get_ydata().tolist() == pytest.approx([100 * entry["few"] for entry in validated.history])
    assert len(loss.get_lines()[0].get_xdata()) == 3  # epoch 0 has no loss
    assert any(f"epoch {validated.selected_epoch}" in str(line.get_label()) for line in accuracy.get_lines())


def test_a_training_as_html(training, monkeypatch):
    plain, validated = training
    odd = dataclasses.replace(validated, selection="<script>x</script>", engine_reason="a & b")
    for result in (plain, validated, odd):
        page = Page(history_html(result))
        assert page.open == [] and all(value.startswith("#") for _, _, value in page.references)
    text = history_html(odd)
    assert "<script" not in text and "&lt;script&gt;" in text and "a &amp; b" in text and "<svg" in text
    assert percent(validated.metrics_after["few"]) in text
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "<svg" not in history_html(validated) and "<table" in history_html(validated)


def test_splits_without_classes_are_left_out(tmp_path):
    """A study whose classes are few and many alone."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
    for part in ("train", "val", "test"):
        write_features(tmp_path / part, torch.randn(95, 8, generator=generator), labels, num_classes=4)
    options = StudyOptions(experiments=["compare"], gammas=[1.0], epochs=1, seeds=1, top_k=2)
    run_study(tmp_path, nn.Linear(8, 4), tmp_path / "study", options, many_above=20, progress=False)
    files = write_report(tmp_path / "study", tmp_path / "report")
    line = Page(page_of(files)).table("method", "chosen on validation")[0]
    assert line["medium top-1"] == "-" and line["many top-1"] != "-"
    assert ClassSplit(few=[3], medium=[], many=[0, 1, 2]).num_classes == 4
