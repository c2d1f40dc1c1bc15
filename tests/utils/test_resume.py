"""A training's file: what it keeps, and whose training it takes up."""

from __future__ import annotations

import pytest
import torch

from alphaext.utils.resume import ResumableTraining


def training(**identity: object) -> ResumableTraining:
    made = ResumableTraining("one of ours", {"weight": torch.Tensor})
    made.identity = identity
    return made


def test_the_best_epoch_is_kept_and_read_back(tmp_path):
    first = training(lr=0.1)
    for epoch, score in enumerate((0.2, 0.5, 0.5, 0.4)):
        if first.add_epoch({"epoch": epoch}, score):
            first.selected = [torch.tensor(epoch)]
    assert (first.selected_epoch, first.selected_score) == (1, 0.5)
    first.save(tmp_path / "run.pt", weight=torch.ones(2))
    again = training(lr=0.1)
    assert torch.equal(again.load(tmp_path / "run.pt")["weight"], torch.ones(2))
    assert (again.selected_epoch, again.selected, again.history) == (1, [torch.tensor(1)], first.history)


@pytest.mark.parametrize("identity", [{"lr": 0.2}, {}, {"lr": 0.1, "nesterov": True}])
def test_another_training_is_refused(tmp_path, identity):
    training(lr=0.1).save(tmp_path / "run.pt", weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"run\.pt belongs to another training: (lr|nesterov) is .* there; ask me"):
        training(**identity).load(tmp_path / "run.pt", advice=lambda name: "; ask me")


def test_other_content_is_refused(tmp_path):
    training().save(tmp_path / "run.pt", weight=3)
    with pytest.raises(ValueError, match=r"run\.pt cannot be read as one of ours: TypeError: weight is a int"):
        training().load(tmp_path / "run.pt")
