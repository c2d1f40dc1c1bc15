"""What is said of packages that are missing."""

from __future__ import annotations

import importlib.metadata

import pytest

from alphaext.utils.packages import require

LISTED = ["numpy>=1.24", 'timm>=1.0; extra == "timm"', 'pillow>=9; extra == "vision"', "torchvision>=0.25 ; extra == 'vision'"]


def test_the_command_names_what_can_be_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: LISTED)
    with pytest.raises(ImportError, match=r"^work needs nothing_such \(.*\): pip install 'pillow>=9' 'torchvision>=0.25'$"):
        require("nothing_such.part", "work needs", "'alphaext[vision]'")
    with pytest.raises(ImportError, match=r": pip install nothing-such$"):
        require("nothing_such", "work needs", "nothing-such")


def test_the_extra_is_named_where_nothing_is_known_of_it(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    with pytest.raises(ImportError, match=r"pip install 'alphaext\[vision\]'$"):
        require("nothing_such", "work needs", "'alphaext[vision]'")
