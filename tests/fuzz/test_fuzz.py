"""A minute of the attacks; `python tests/fuzz/campaign.py --seconds 3600` is an hour of them."""

from __future__ import annotations

import pytest
from campaign import ROUND, in_a_process


@pytest.mark.parametrize("name", ROUND)
def test_attack(name: str) -> None:
    outcomes, error = in_a_process(name, ROUND[name], 0)
    print(name, dict(outcomes))
    assert error == "" and sum(outcomes.values()) >= ROUND[name] // 2
