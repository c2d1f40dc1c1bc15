"""Features, labels and layers of any strides, dtype and mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alphaext import repair

LABELS = torch.arange(7).repeat_interleave(torch.tensor([30, 25, 24, 22, 21, 6, 4]))
FEATURES = torch.randn(len(LABELS), 16, generator=torch.Generator().manual_seed(0))


def layer(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(16, 7)


def repaired(linear: nn.Linear, **given: Any) -> Tensor:
    arguments = {"features": FEATURES, "labels": LABELS, "val_features": FEATURES, "val_labels": LABELS, **given}
    return repair(linear, arguments.pop("features"), arguments.pop("labels"), epochs=2, **arguments).linear.weight.detach()


def every_other(tensor: Tensor) -> Tensor:
    larger = torch.zeros([2 * size for size in tensor.shape], dtype=tensor.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def read_only(tensor: Tensor) -> Any:
    array = tensor.numpy().copy()
    array.setflags(write=False)
    return array


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "every other": every_other,
    "by columns": lambda tensor: tensor.unsqueeze(-1).transpose(0, 1).contiguous().transpose(0, 1).squeeze(-1),
    "reversed": lambda tensor: np.ascontiguousarray(tensor.numpy()[::-1])[::-1],
    "read only": read_only,
    "a list": Tensor.tolist,
    "wider": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.int(),
    "with a gradient": lambda tensor: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor,
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable", "ignore:Few classes lose")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["features", "labels", "val_features", "val_labels"])
def test_any_form_gives_the_same(form: str, which: str) -> None:
    plain = FEATURES if "features" in which else LABELS
    # Features in double precision are rounded later than those in single precision.
    tolerance = 1e-5 if which == "features" and form in ("a list", "wider") else 0
    made = repaired(layer(), **{which: FORMS[form](plain)})
    torch.testing.assert_close(made, repaired(layer()), rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Few classes lose")
def test_inference_mode() -> None:
    expected = repaired(layer())
    with torch.inference_mode():
        there = {"features": FEATURES + 0, "labels": LABELS + 0}
        linear = layer()
        assert torch.equal(repaired(layer()), expected)
    assert linear.weight.is_inference()
    assert torch.equal(repaired(linear), expected) and torch.equal(repaired(layer(), **there), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_names_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"the head is torch\.\w+, not float32 or float64; linear\.float\(\)"):
        repaired(layer().to(dtype))
    assert repaired(layer(), features=FEATURES.to(dtype)).dtype == torch.float32
