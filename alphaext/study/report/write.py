"""A report of studies: one HTML file, the figures as PNG and SVG, and the tables as Markdown, from the studies' files alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...metrics.accuracy import SPLITS
from ...utils.checks import check_text
from ...utils.figures import clean_text, require_matplotlib
from ...utils.files import PathLike, check_no_file, file_digest, folder_lock, read_json, whole_file, write_json
from ...utils.packages import require
from ..plans import EXPERIMENTS
from .advice import advice_blocks
from .content import Block, Section, TextBlock, pictures_of
from .data import StudyFiles, read_studies
from .figures import class_blocks, experiment_blocks
from .front import front_blocks
from .tables import calibration_table, compare_table, confusion_tables, cost_table, error_table, settings_table

HTML, TABLES, FIGURES, WRITTEN = "report.html", "tables.md", "figures", "report.json"
_FORMAT = "alphaext report 1"


@dataclass(frozen=True)
class ReportFiles:
    """What :func:`write_report` wrote.

    Attributes:
        html: the report, complete in itself.
        tables: its tables as Markdown.
        figures: its figures, each as PNG and as SVG.
        findings: what the report advises, and what it says of the trade-off front.
    """

    html: Path
    tables: Path
    figures: tuple[Path, ...]
    findings: tuple[str, ...]


def write_report(
    study: PathLike | Sequence[PathLike], output: PathLike, *, overwrite: bool = False, title: str | None = None
) -> ReportFiles:
    """Make a report of one or several studies out of the files that they wrote; nothing is trained or measured again.

    The folder gets ``report.html``, which needs no other file and no network; ``tables.md``; ``figures/``, each figure as PNG
    and SVG; and ``report.json``, which says what was written, so that a later report replaces its own files and no other. The
    same studies make the same bytes, with the same version of matplotlib.

    Args:
        study: the folder that ``alphaext study`` or :func:`alphaext.study.run_study` wrote, or several, such as those of
            several classifiers: the trade-off front and the comparison then hold all of them, and each has a section.
        output: the report's folder; made if need be.
        overwrite: replace files of these names that were not written by a report, or were changed since.
        title: of the page.

    Returns:
        Where the files are, and what the report advises and says of the front.

    Raises:
        FileNotFoundError: a folder without a study.
        ImportError: matplotlib is missing.
        TypeError: arguments of another type.
        ValueError: a file of a study that is not as it must be, or files in ``output`` that are not a report's own.

    Example:
        >>> import tempfile
        >>> from alphaext.study import StudyOptions, run_study
        >>> folder, labels = tempfile.mkdtemp(), torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
        >>> for part in ("train", "val", "test"):
        ...     _ = write_features(f"{folder}/{part}", torch.randn(95, 8), labels, num_classes=4)
        >>> options = StudyOptions(experiments=["negatives"], negative_ratios=[1.0], epochs=1, seeds=1, top_k=2)
        >>> _ = run_study(folder, nn.Linear(8, 4), f"{folder}/study", options, many_above=20)
        >>> files = write_report(f"{folder}/study", f"{folder}/report")
        >>> files.html.name, files.tables.name, [path.suffix for path in files.figures[:2]]
        ('report.html', 'tables.md', ['.png', '.svg'])
    """
    check_text(title, "title")
    folders = [study] if isinstance(study, (str, os.PathLike)) else list(study)
    target = check_no_file(output, "output")
    studies = read_studies(folders)
    require_matplotlib()
    require("jinja2", "a report needs", "'alphaext[report]'")
    from .page import markdown, page

    sections = _sections(studies)
    heading = title if title is not None else f"Alpha Net study: {', '.join(each.name for each in studies)}"
    files: dict[str, bytes] = {
        HTML: page(heading, _lead(studies), sections, _foot(studies)).encode("utf-8"),
        TABLES: markdown(heading, sections).encode("utf-8"),
    }
    for picture in pictures_of(sections):
        files |= {f"{FIGURES}/{picture.name}.png": picture.png, f"{FIGURES}/{picture.name}.svg": picture.svg}
    _write(target, files, overwrite)
    findings = (
        block.text
        for section in sections
        for block in section.blocks
        if isinstance(block, TextBlock) and block.kind == "finding"
    )
    return ReportFiles(
        target / HTML, target / TABLES, tuple(target / name for name in files if name.startswith(FIGURES)), tuple(findings)
    )


def _sections(studies: Sequence[StudyFiles]) -> list[Section]:
    sections = [
        Section("advice", "What to take for these data", tuple(advice_blocks(studies))),
        Section("front", "The trade-off front", tuple(front_blocks(studies))),
        Section(
            "compare", "Alpha Net and its rivals", (*compare_table(studies), *cost_table(studies), *calibration_table(studies))
        ),
        *(_study_section(study, len(studies) > 1) for study in studies),
        Section("about", "How it was made", (*error_table(studies), *map(settings_table, studies))),
    ]
    return [section for section in sections if section.key not in ("advice", "compare") or section.blocks]


def _study_section(study: StudyFiles, several: bool) -> Section:
    blocks: list[Block] = []
    if study.info["finished"] is None:
        blocks.append(TextBlock("This study is not finished: run again, it goes on. What is here is what there is.", "warning"))
    if study.missing:
        named = "; ".join(f"{name} ({EXPERIMENTS[name]})" for name in study.missing)
        blocks.append(TextBlock(f"Not in this study: {named}."))
    shown = [("Classes", class_blocks(study)), ("Confusions", _confusion_blocks(study))]
    shown += [(name, experiment_blocks(study, name)) for name in study.experiments if name != "compare"]
    parts = (Section(f"part--{study.key}--{n}", name, tuple(own)) for n, (name, own) in enumerate(shown) if own)
    title = f"The classifier {study.name}" if several else "The experiments"
    return Section(f"study--{study.key}", title, tuple(blocks), tuple(parts))


def _confusion_blocks(study: StudyFiles) -> list[Block]:
    tables = confusion_tables(study)
    if not tables:
        return []
    totals = [row for row in study.confusions if row.is_total]
    before, after = sum(row.before for row in totals), sum(row.after for row in totals)
    text = f"Under the Alpha Net that validation chose, first seed: {before:,} test samples confused before, {after:,} after."
    if not any(not row.is_total for row in study.confusions):
        text += " No pair of classes is confused more or less often than before."
    return [TextBlock(text), *tables]


def _lead(studies: Sequence[StudyFiles]) -> list[str]:
    lead = []
    for study in studies:
        numbers = ", ".join(f"{study.part('classes', part)} {part}" for part in SPLITS)
        tested, finished = study.part("samples", "test"), study.info["finished"]
        samples = "" if tested is None else f", {tested:,} test samples"
        date = "not finished" if finished is None else f"finished {clean_text(finished)[:10]}"
        lead.append(f"{study.name}: {numbers} classes{samples}; study {date}.")
    return [*lead, "All accuracies are on test samples; whatever was chosen was chosen on validation samples."]


def _foot(studies: Sequence[StudyFiles]) -> list[str]:
    foot = [text for text in dict.fromkeys(study.attribution for study in studies) if text]
    for study in studies:
        versions = ", ".join(f"{name} {value}" for name, value in study.info["versions"].items() if value)
        foot.append(f"{study.name}: {versions or 'versions not known'}; finished {study.info['finished'] or 'not yet'}.")
    return foot


def _write(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write all files, each whole; what an earlier report wrote is replaced or removed, nothing else unless ``overwrite``."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, "a report"):
        earlier = _written(folder)
        there = {name: digest for name in {*earlier, *files} if (digest := _digest(folder / name)) is not None}
        own = {name for name in earlier if there.get(name) in earlier[name]}
        foreign = [name for name in files if (folder / name).exists() and name not in own and there.get(name) != digests[name]]
        # The record is its own where it could be read.
        foreign += [WRITTEN] if (folder / WRITTEN).exists() and not earlier else []
        if foreign and not overwrite:
            raise ValueError(
                f"output {str(folder)!r} has {foreign[0]}, which no report wrote or which was changed since; give another "
                "folder, or overwrite it (--overwrite)"
            )
        (folder / FIGURES).mkdir(exist_ok=True)
        # First what will be there, then the files: after an interruption they are known as a report's own.
        _write_record(folder, {name: {*earlier.get(name, ()), digests.get(name, "")} - {""} for name in {*earlier, *files}})
        for name in own - set(files):
            (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            with whole_file(folder / name) as file:
                file.write(content)
        _write_record(folder, {name: {digest} for name, digest in digests.items()})


def _write_record(folder: Path, digests: Mapping[str, Collection[str]]) -> None:
    write_json(folder / WRITTEN, {"format": _FORMAT, "files": {name: sorted(digests[name]) for name in sorted(digests)}})


def _written(folder: Path) -> dict[str, list[str]]:
    """The digests of what an earlier report wrote, by name; empty where there was none."""
    try:
        record = read_json(folder / WRITTEN, "a report's record")
    except (FileNotFoundError, ValueError):
        return {}
    files = record.get("files") if record.get("format") == _FORMAT else None
    if not isinstance(files, dict):
        return {}
    # Names that lead out of the folder are no report's.
    return {
        name: [str(digest) for digest in digests]
        for name, digests in files.items()
        if isinstance(digests, list) and (name in (HTML, TABLES) or Path(name) == Path(FIGURES) / Path(name).name)
    }


def _digest(path: Path) -> str | None:
    return file_digest(path) if path.is_file() and not path.is_symlink() else None
