"""A minute of the attacks; `python tests/fuzz/campaign.py --seconds 3600` is an hour of them."""

from __future__ import annotations

import pytest
from campaign import ROUND, in_a_process


@pytest.mark.parametrize("name", ROUND)
def test_attack(name: str) -> None:
    outcomes, kind, error = in_a_process(name, 0)
    print(name, dict(outcomes))
    assert kind == "", error
    assert sum(outcomes.values()) >= ROUND[name] // 2
