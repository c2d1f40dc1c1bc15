"""One table of options: signatures, flags, presets and the page of the documentation follow it."""

from __future__ import annotations

import inspect

import pytest
from option_table import PAGE, table

from alphaext import AlphaNet, fit, fit_many, recommend, repair
from alphaext.commands.fit import Fit
from alphaext.commands.options import kinds_of
from alphaext.pretraining import train_model
from alphaext.pretraining.options import JointOptions
from alphaext.sklearn import AlphaNetClassifier
from alphaext.training import PRESETS
from alphaext.training.builder import Builder
from alphaext.training.options import OPTIONS, HeadOptions, TrainingOptions, read_options

HEAD = list(HeadOptions.__dataclass_fields__)
TRAINING = list(TrainingOptions.__dataclass_fields__)


def defaults(function):
    return {name: each.default for name, each in inspect.signature(function).parameters.items()}


def test_defaults_are_the_tables():
    own = defaults(AlphaNet.__init__) | defaults(AlphaNet.from_linear)
    assert {name: own[name] for name in HEAD} == {name: OPTIONS[name].default for name in HEAD}
    assert {name: defaults(fit)[name] for name in TRAINING} == {name: OPTIONS[name].default for name in TRAINING}
    estimator = defaults(AlphaNetClassifier)
    for name in set(estimator) & set(OPTIONS):
        assert estimator[name] in (None, OPTIONS[name].default)  # None: what the preset says
    assert {"top_k", "gamma", "epochs", "lr", "select"} <= set(estimator)
    assert AlphaNetClassifier(epochs=3).get_params()["epochs"] == 3
    with pytest.raises(TypeError, match="unknown option 'epoch'"):
        AlphaNetClassifier(epoch=3)


def test_a_joint_training_takes_its_table():
    own, table = defaults(train_model), defaults(JointOptions)
    assert {name: own[name] for name in table} == table


def test_what_says_the_data_is_said_alike():
    data = defaults(Builder)
    del data["linear"], data["means"]  # of which fit_many takes means, too
    for function in (fit_many, repair, recommend):
        own = defaults(function)
        # Where the configurations come behind the labels, these have no default.
        assert {name: None if own[name] is inspect.Parameter.empty else own[name] for name in data if name != "features"} == {
            name: data[name] for name in data if name != "features"
        }


def test_flags_and_presets_are_the_tables():
    kinds = {kind.name: kind for kind in kinds_of(Fit)}
    for name in set(OPTIONS) - {"seed"}:
        assert kinds[name].section == "fit" and kinds[name].default is None
        assert OPTIONS[name].metadata["help"] in kinds[name].help
        assert set(OPTIONS[name].metadata["choices"] or ()) <= set(kinds[name].choices or ())
    assert all(set(preset) == set(OPTIONS) - {"seed"} for preset in PRESETS.values())
    for preset in PRESETS.values():
        read_options(preset)  # each of its values is allowed


def test_the_docstring_says_what_the_fields_say():
    text = " ".join(TrainingOptions.__doc__.split())
    assert all(f" {name}: {OPTIONS[name].metadata['help']}. " in text for name in TRAINING)
    assert "drawn samples of each few class." in text and "0 in the paper's appendix E." in text


def test_the_page_is_the_table():
    assert PAGE.read_text().endswith(table()), "python tests/helpers/option_table.py"


@pytest.mark.parametrize("name", [name for name, entry in OPTIONS.items() if entry.metadata["choices"]])
def test_choices_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'nothing'"):
        read_options({name: "nothing"})


@pytest.mark.parametrize("name", [name for name, entry in OPTIONS.items() if {"minimum", "above"} & set(entry.metadata)])
def test_bounds_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be "):
        read_options({name: -1})
