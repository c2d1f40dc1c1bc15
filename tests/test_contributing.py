"""CONTRIBUTING says where things are: each is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
if not PAGE.is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

SECTION = PAGE.read_text(encoding="utf-8").partition("### Where is")[2].partition("\n## ")[0]
PLACES = re.findall(r"`([\w./]+\.\w+)`: `([^`]+)`", SECTION)


def test_there_are_places():
    assert len(PLACES) >= 10


@pytest.mark.parametrize(("path", "text"), PLACES)
def test_a_place_is_the_one_line_that_the_page_says(path, text):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert sum(text in line for line in lines) == 1


def test_every_folder_of_the_package_is_told():
    text = PAGE.read_text(encoding="utf-8")
    for folder in sorted((ROOT / "alphaext").glob("*/__init__.py")):
        assert f"`alphaext/{folder.parent.name}/`" in text
