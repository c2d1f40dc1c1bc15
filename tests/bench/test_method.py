"""The tables of presets against rivals: the front, and intervals over draws."""

from __future__ import annotations

import long_tailed_sets
import method
import pytest
import torch

from alphaext import ClassSplit
from alphaext.baselines import few_bias
from alphaext.metrics import split_accuracy


def test_front_is_what_constants_come_to() -> None:
    generator = torch.Generator().manual_seed(0)
    split = ClassSplit(few=[3, 4], medium=[0, 1, 2], many=[])
    linear = torch.nn.Linear(5, 5)
    features, labels = torch.randn(200, 5, generator=generator), torch.randint(5, (200,), generator=generator)
    with torch.no_grad():
        front = method.front(linear(features), labels, split)
        tried = [
            split_accuracy(few_bias(linear, [3, 4], offset.item())(features), labels, split)
            for offset in torch.linspace(-9, 9, 181)
        ]
    for own in tried:
        best = max(other["all"] for other in tried if other["few"] >= own["few"])
        height = front(own["few"])
        assert height is not None and height >= best - 1e-9
    assert front(1.01) is None


def test_summary_has_means_and_intervals() -> None:
    def row(method_name: str, draw: int, few: float, overall: float) -> dict[str, str]:
        cells = {"few": few, "medium": 0, "many": 0, "base": 0, "all": overall, "front": "", "seconds": 1}
        return {"set": "digits", "draw": str(draw), "classifier": "joint", "method": method_name} | {
            name: str(value) for name, value in cells.items()
        }

    rows = [row(name, draw, 50, 60) for name in method.methods() if name != method.ALL for draw in (2, 3)]
    rows += [row(method.ALL, 2, 55, 61), row(method.ALL, 3, 57, 63), row(method.ALL, 4, 99, 99)]
    found = next(each for each in method.summarize(rows) if each["method"] == method.ALL)
    assert (found["draws"], found["few"], found["all"]) == (3, "70.33", "74.33")
    # Draw by draw, where both have the draw.
    assert found["all less preset few"] == "2.00" and float(found["all less preset few, low"]) == pytest.approx(
        -10.71, abs=0.01
    )
    assert found["beyond the front"] == 3
    assert "70.3 / 74.3 (3 of 2 draws)" in method.markdown(method.summarize(rows))
    assert "| digits | joint | no | yes | yes | yes | no |" in method.markdown(method.summarize(rows))


def test_redraws_are_disjoint_and_make_base_classes_few() -> None:
    counts = torch.tensor([40] * 8 + [5] * 4)
    labels = torch.arange(12).repeat_interleave(counts + 10)
    parts = long_tailed_sets.redraw(labels, counts, test=6, val=4, seed=0)
    everything = torch.cat(list(parts.values()))
    assert len(everything.unique()) == len(everything)
    assert labels[parts["test"]].bincount().tolist() == [6] * 12 and labels[parts["val"]].bincount().tolist() == [4] * 12
    assert int((labels[parts["train"]].bincount() < 20).sum()) == 6
    assert counts.tolist() == [40] * 8 + [5] * 4
