"""The documentation site: ``pip install -e ".[docs]" && sphinx-build -W docs build/docs``."""

from __future__ import annotations

import os
import re
import textwrap
from importlib.metadata import version as installed_version
from pathlib import Path

from alphaext.commands.main import build_parser

ROOT = Path(__file__).resolve().parents[1]

project = "alphaext"
author = "the alphaext maintainers"
copyright = author
version = release = installed_version("alphaext")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_gallery.gen_gallery"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["examples/*", "gallery/*.py", "gallery/*.md5", "gallery/*.ipynb"]
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "show_memory": False,
    "min_reported_time": 1e9,
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "capture_repr": (),
    "within_subsection_order": "ExampleTitleSortKey",
}
myst_heading_anchors = 4  # links to headings, as GitHub makes them
myst_enable_extensions = ["dollarmath"]
autodoc_typehints = "none"  # shapes and dtypes stand in the docstrings
autodoc_member_order = "bysource"
napoleon_use_rtype = False
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"alphaext {version}"

# Links into the repository, which is not part of the site: `[text](../path)`.
_TO_REPOSITORY = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def name_repository_files(app: object, name: str, source: list[str]) -> None:
    """Turn links to files of the repository into their names. A file that is missing is an error."""
    folder = (ROOT / "docs" / name).parent

    def named(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return match[0]
        if not path.exists():
            raise FileNotFoundError(f"docs/{name} links to {match[2]}, which is missing")
        return f"{match[1]} (`{path.relative_to(ROOT)}`)"

    source[0] = _TO_REPOSITORY.sub(named, source[0])


def add_help(app: object, name: str, source: list[str]) -> None:
    """Put the help of every command where the page of commands has its comment."""
    if name != "reference/commands":
        return
    width = 90  # of the site's column
    os.environ["COLUMNS"] = str(width)  # argparse breaks lines by it, but for descriptions
    parsers = next(iter(build_parser()._subparsers._group_actions)).choices  # type: ignore[union-attr]
    texts = []
    for command, parser in parsers.items():
        parts = (part if "\n " in part else textwrap.fill(part, width) for part in parser.format_help().split("\n\n"))
        texts.append(f"## alphaext {command}\n\n```text\n" + "\n\n".join(parts) + "\n```\n")
    source[0] = source[0].replace("<!-- the help of every command -->", "\n".join(texts))


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("source-read", name_repository_files)  # type: ignore[attr-defined]
    app.connect("source-read", add_help)  # type: ignore[attr-defined]
