"""Every command and example of README and the guides runs as it stands, on data that are made up; every link leads somewhere.

The commands of ImageNet-LT and Places-LT need these data: they are parsed, with the guide's own configuration.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from alphaext.commands import COMMANDS, CONFIGURABLE
from alphaext.commands.main import build_parser
from alphaext.commands.options import from_flags, read_config

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "docs" / "guides"
PAGES = {
    str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
}
FENCED = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Which blocks there are, each run by a test of this file; README's Python by tests/test_readme.py, its sh by .ci/run.
RUN = {
    "README.md": {"sh": 2, "python": 2, "": 1},
    "docs/guides/folders.md": {"toml": 1, "sh": 1},
    "docs/guides/head.md": {"python": 1},
    "docs/guides/huggingface.md": {"python": 2, "toml": 1},
    "docs/guides/imagenet_lt.md": {"toml": 1, "sh": 6},
    "docs/guides/new_classes.md": {"python": 1},
    "docs/guides/places_lt.md": {"toml": 1, "sh": 1},
    "docs/guides/pytorch.md": {"python": 2},
    "docs/guides/sklearn.md": {"python": 1},
    "docs/guides/which_preset.md": {"python": 1},
}


def blocks(page: str, language: str) -> list[str]:
    return [text for name, text in FENCED.findall((GUIDES / page).read_text()) if name == language]


def test_there_is_no_block_that_nothing_runs():
    found = {
        page: dict(Counter(name for name, _ in FENCED.findall(path.read_text()) if not name.startswith("{")))
        for page, path in PAGES.items()
    }
    assert {page: counts for page, counts in found.items() if counts} == RUN


def commands(page: str) -> Iterator[list[str]]:
    """The commands of a page as the shell would hand them over, variables and loops done, and indented ones."""
    text = PAGES[page].read_text()
    languages = ("",) if page == "README.md" else ("sh", "")
    blocks = [text for name, text in FENCED.findall(text) if name in languages]
    tell = "alphaext() { printf '%s\\037' \"$@\"; echo; }\n"
    # Variables live on from block to block.
    done = subprocess.run(["bash", "-ec", tell + "\n".join(blocks)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        yield line.split("\037")[:-1]
    for line in re.findall(r"^    alphaext (.*)$", text, re.MULTILINE):
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_they_are_told_with(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FENCED.findall(PAGES[page].read_text()):
        if name == "toml":
            head = re.match(r"# (\S+\.toml)\n", text)
            file = Path(head[1] if head else "mine.toml")
            file.write_text(text)
            read_config(file, CONFIGURABLE)
    for arguments in commands(page):
        flags, unknown = build_parser().parse_known_args(arguments)
        assert not unknown, arguments
        given = vars(flags)
        command, config = COMMANDS[given.pop("command")], given.get("config")
        if config is None or Path(config).exists():  # another one is the reader's, and may say anything
            from_flags(command, given, None if config is None else read_config(config, CONFIGURABLE))


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = PAGES[page]
    text = FENCED.sub("", path.read_text())
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        if name == "gallery/index.rst" or "/gallery/" in name:  # made by the examples
            continue
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text()), target
    for script in re.findall(r"python ((?:bench|tests)/[\w/]+\.py)", path.read_text()):
        assert (ROOT / script).exists(), script


def layer_and_samples() -> dict:
    """A trained last layer of five classes, one of them with few samples."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 16, generator=generator)

    def drawn(labels: torch.Tensor) -> torch.Tensor:
        return centres[labels] + 0.7 * torch.randn(len(labels), 16, generator=generator)

    labels = torch.arange(5).repeat_interleave(torch.tensor([40, 40, 30, 25, 6]))
    val_labels, new_labels = torch.arange(5).repeat_interleave(12), torch.tensor([5, 5, 5, 6, 6])
    model = nn.Module()
    model.fc = nn.Linear(16, 5)
    model.fc.weight.data.copy_(centres[:5])
    names = {"labels": labels, "val_labels": val_labels, "new_labels": new_labels}
    return {"model": model, **names, **{name.replace("labels", "features"): drawn(ids) for name, ids in names.items()}}


@pytest.mark.parametrize(("page", "classes"), [("which_preset.md", 5), ("new_classes.md", 7)])
def test_examples_on_features(page, classes):
    names = layer_and_samples()
    (code,) = blocks(page, "python")
    exec(compile(code, page, "exec"), names)
    assert type(names["model"].fc) is nn.Linear and names["model"].fc.out_features == classes


def test_scikit_learn(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks("sklearn.md", "python")
    exec(compile(code, "sklearn.md", "exec"), {})
    first, before, after = capsys.readouterr().out.split("\n")[:3]
    assert first == "36 True"
    told = [float(number) for number in re.findall(r"pipeline: ([\d.]+)|one: ([\d.]+)", code) for number in number if number]
    assert [float(before), float(after)] == pytest.approx(told, abs=0.01)


@pytest.mark.skipif("ALPHAEXT_DATA" not in os.environ, reason="needs ALPHAEXT_DATA")
def test_the_photographs_of_the_gallery(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    code = (ROOT / "docs" / "examples" / "photographs.py").read_text()
    exec(compile(code, "photographs.py", "exec"), {})
    said = [float(number) for number in re.findall(r"([\d.]+)%", capsys.readouterr().out)]
    told = [
        float(number) for number in re.findall(r"([\d.]+)%", code.partition("It prints::")[2].partition("# The picture")[0])
    ]
    assert len(said) == 6 and said == pytest.approx(told, abs=1.0)
    assert (tmp_path / "photographs.jpg").stat().st_size > 10_000


@pytest.mark.parametrize(("page", "package"), [("pytorch.md", "torch"), ("huggingface.md", "transformers")])
def test_examples(page, package, tmp_path, monkeypatch, capsys):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)
    assert "classes are few" in capsys.readouterr().out
    if package == "transformers":
        model, saved = nn.Module(), nn.Linear(4, 3).state_dict()
        model.score = nn.Linear(4, 3, bias=False)
        assert torch.equal(names["with_classifier"](model, saved).score.bias, saved["bias"])


def test_folders(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    from PIL import Image

    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=4).state_dict(), tmp_path / "trained.pth")
    for part, counts in {"train": (22, 21, 20, 3), "val": (2, 2, 2, 2), "test": (2, 2, 2, 2)}.items():
        for label, count in enumerate(counts):
            (tmp_path / part / f"kind {label}").mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / f"kind {label}" / f"{number}.png")
    (settings,), (commands,) = blocks("folders.md", "toml"), blocks("folders.md", "sh")
    (tmp_path / "mine.toml").write_text(settings + "allow_chance = true\n")  # the network is random
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("trained.pth", "repaired.pth"))
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {"fc.weight", "fc.bias"}


def test_the_head_step_by_step():
    pytest.importorskip("torchvision")
    (code,) = blocks("head.md", "python")
    torch.manual_seed(0)
    labels = torch.cat([torch.arange(1000).repeat_interleave(20), torch.arange(990).repeat_interleave(5)])
    labels = labels[~((labels >= 990) & (torch.rand(len(labels)) < 0.3))]
    data = {"data": (torch.rand(len(labels), 2048), labels, torch.rand(50, 2048), torch.randint(1000, (50,)))}
    code = code.replace('model.load_state_dict(torch.load("trained.pth", weights_only=True))', "")
    code = code.replace("val_labels = ...", "val_labels = data")
    code = code.replace("val_labels=val_labels)", "val_labels=val_labels, epochs=1)")
    exec(compile(code, "head.md", "exec"), data)
    assert type(data["model"].fc) is torch.nn.Linear and len(data["head"].few_classes) == 10
    assert set(data["result"].after) == {"few", "medium", "many", "all"}
