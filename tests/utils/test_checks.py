"""Arguments that are no numbers, no flags, or too large to be written."""

from __future__ import annotations

import numpy as np
import pytest

from alphaext.training.options import TrainingOptions
from alphaext.utils.checks import check_flag

HUGE = 2**20000


@pytest.mark.parametrize("name", ["epochs", "lr", "momentum", "lr_step", "max_base_drop", "seed", "select", "regularize"])
def test_every_bad_number_is_named(name):
    for value in (HUGE, -HUGE, float("nan"), float("inf"), "1", True, [1]):
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be "):
            TrainingOptions(**{name: value})


@pytest.mark.parametrize("name", ["nesterov", "prior_correction", "few_bias", "keep_original"])
def test_no_text_is_taken_for_true(name):
    for value in ("no", 1, 0.0, None, HUGE, np.array([True])):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            TrainingOptions(**{name: value})
    assert check_flag(np.bool_(True), name) is True
