"""Every operator checks every tensor that it is given: kernels read them without looking again."""

from __future__ import annotations

import pytest
import torch
from emulated_gpu import DIRECTORY

import alphaext.ops  # noqa: F401  (registers the operators)

F, M, N, D, H, BATCH, TILE, BLOCK, TOP = 3, 4, 9, 5, 6, 7, 16, 64, 5
DOUBLE = torch.float64


def ids(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return (torch.arange(int(torch.tensor(shape).prod())) % high).reshape(shape).to(dtype)


def numbers(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=DOUBLE)


def head() -> dict[str, object]:
    members = torch.stack([torch.tensor([f, 3, 4, 5]) for f in range(F)])
    return dict(
        input=numbers(BATCH, D), weight=numbers(N, D), bias=numbers(N), members=members, z=numbers(F, 8), w1=numbers(F, H, 8)
    ) | dict(b1=numbers(F, H), w2=numbers(F, M, H), b2=numbers(F, M), gamma=0.7, rule=1, projected_gradient=False)


def head_backward() -> dict[str, object]:
    given = head()
    options = {name: given.pop(name) for name in ("gamma", "rule", "projected_gradient")}
    saved = dict(preactivation=numbers(F, H), raw=numbers(F, M), alpha=numbers(F, M), logits=numbers(BATCH, N))
    return dict(grad_scores=numbers(BATCH, N)) | given | saved | options | dict(wanted=255)


def train_epoch(*lead: int) -> dict[str, object]:
    state = numbers(*lead, F, 1, 2 + 2 * M, TILE)
    given = dict(state=state, b2=numbers(*lead, F, M), b2_momentum=numbers(*lead, F, M), raw=numbers(*lead, F, M))
    given |= dict(alpha=numbers(*lead, F, M), order=ids(11, *lead, 8), member_logits=numbers(11, 6), base_logsumexp=numbers(11))
    given |= dict(label_logit=numbers(11), few_of_label=ids(F, 11, dtype=torch.int32) - 1)
    given |= dict(member_columns=ids(6, *lead, F, M, dtype=torch.int32), gradient_scale=numbers(*lead, F), batch=4)
    extra = dict(penalty=numbers(*lead, 2, M), few_offset=numbers(*lead, F))
    if lead:
        return given | dict(settings=torch.tensor([[0.7, 1, 0, 0.1, 0.9, 0, 0, 0, 1, 8]] * lead[0], dtype=DOUBLE)) | extra
    sgd = dict(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, first_step=True)
    return given | dict(gamma=0.7, rule=1, projected_gradient=False) | sgd | extra


def validate(*lead: int) -> dict[str, object]:
    rows = 70
    return dict(
        alpha=numbers(*lead, F, M),
        member_columns=ids(6, *lead, F, M, dtype=torch.int32),
        few_classes=ids(F, F, dtype=torch.int32),
        member_logits=numbers(2, 6, BLOCK),
        label_logit=numbers(rows),
        top_logits=numbers(rows, TOP),
        top_ids=ids(N, rows, TOP, dtype=torch.int32),
        labels=ids(N, rows),
        few_of_label=ids(F, rows, dtype=torch.int32) - 1,
        num_classes=N,
    )


def cache_logits(for_validation: bool) -> dict[str, object]:
    rows = 70
    member_logits = numbers(2, 6, BLOCK) if for_validation else numbers(rows, 6)
    given = dict(logits=numbers(rows, N), labels=ids(N, rows), few_penalty=numbers(N), column_class=ids(N, 6))
    given |= dict(column_bias=numbers(6), member_logits=member_logits, base_logsumexp=numbers(rows), label_logit=numbers(rows))
    top = dict(top_logits=numbers(rows, TOP), top_ids=ids(N, rows, TOP, dtype=torch.int32))
    return given | (top if for_validation else dict(top_logits=None, top_ids=None))


OPERATORS = {
    "head": head,
    "head_backward": head_backward,
    "train_epoch": train_epoch,
    "train_epoch_many": lambda: train_epoch(2),
    "validate": validate,
    "validate_many": lambda: validate(2),
    "cache_logits": lambda: cache_logits(False),
    "cache_logits, validation": lambda: cache_logits(True),
    "initial_first_layer": lambda: dict(w1=numbers(F, H, 8), b1=numbers(F, H), seed=0, first_network=0),
    "initial_preactivation": lambda: dict(z=numbers(F, 8), hidden=H, shared=False, seed=0),
    "sample_epoch": lambda: dict(num_few=3, group_offsets=torch.tensor([0, 4, 9]), negatives=2, seed=0, epoch=1),
}
ARGUMENTS = [(op, name) for op, make in OPERATORS.items() for name, x in make().items() if isinstance(x, torch.Tensor)]
# Whose last size is nobody else's.
FREE_SIZES = {
    "train_epoch": ("order", "member_logits"),
    "train_epoch_many": ("order", "member_logits"),
    "initial_first_layer": ("w1",),
    "initial_preactivation": ("z",),
    "sample_epoch": ("group_offsets",),
}
TRANSPOSABLE = ("head", "head_backward")  # take any strides


def call(operator: str, given: dict[str, object]) -> object:
    return getattr(torch.ops.alphaext, operator.partition(",")[0])(*given.values())


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_right_passes(operator):
    given = OPERATORS[operator]()
    schema = getattr(torch.ops.alphaext, operator.partition(",")[0]).default._schema
    assert [argument.name for argument in schema.arguments] == list(given)
    call(operator, given)


@pytest.mark.parametrize(("operator", "name"), ARGUMENTS)
def test_every_tensor_is_checked(operator, name):
    right = OPERATORS[operator]()[name]
    other = torch.float32 if right.dtype == DOUBLE else torch.int64 if right.dtype == torch.int32 else torch.int32
    wrong = {"shape": right[None]} if operator == "initial_preactivation" else {"shape": right[None], "dtype": right.to(other)}
    if name not in FREE_SIZES.get(operator, ()):
        wrong["size"] = torch.cat([right, right[..., :1]], -1)
    if operator not in TRANSPOSABLE:
        wrong["strides"] = torch.stack([right, right], -1)[..., 0]
    for what, tensor in wrong.items():
        with pytest.raises(RuntimeError, match=r"alphaext: \w+") as caught:
            call(operator, OPERATORS[operator]() | {name: tensor})
        # The first argument's dtype is that of the others.
        if what == "dtype" and name not in ("input", "state", "alpha", "logits", "w1", "z"):
            assert name in str(caught.value)
    if DIRECTORY is None:
        # One on the meta device sends the call where nothing is computed: unchecked, it brings back whatever memory held.
        with pytest.raises((RuntimeError, NotImplementedError)):
            call(operator, OPERATORS[operator]() | {name: right.to("meta")})


@pytest.mark.parametrize("lead", [(), (2,)])
def test_no_few_class_is_an_error(lead):
    many = "_many" if lead else ""
    for operator, given in ((f"validate{many}", validate(*lead)), (f"train_epoch{many}", train_epoch(*lead))):
        axis = len(lead)
        for name in ("alpha", "member_columns", "raw", "b2", "b2_momentum", "state", "gradient_scale", "few_offset"):
            if name in given:
                given[name] = given[name].narrow(axis, 0, 0).contiguous()
        if "few_classes" in given:
            given["few_classes"] = given["few_classes"][:0]
        given["few_of_label"] = torch.full_like(given["few_of_label"], -1)
        with pytest.raises(RuntimeError, match="with num_few of at least 1, got 0"):
            call(operator, given)


IDS = [
    (operator, name, value)
    for operator, names in {
        "head": ("members",),
        "train_epoch": ("order", "member_columns", "few_of_label"),
        "train_epoch_many": ("order", "member_columns", "few_of_label"),
        "validate": ("member_columns", "few_of_label", "labels"),
        "validate_many": ("member_columns", "few_of_label", "labels"),
        "cache_logits": ("labels", "column_class"),
    }.items()
    for name in names
    for value in (-2, 1000)
]


@pytest.mark.skipif(DIRECTORY is not None, reason="on a GPU the kernels look at ids themselves")
@pytest.mark.parametrize(("operator", "name", "value"), IDS)
def test_every_id_is_checked(operator, name, value):
    given = OPERATORS[operator]()
    given[name].view(-1)[-1] = value
    with pytest.raises(RuntimeError, match=rf"{name}.* must be in \[-?\d, \d+\), got {value}"):
        call(operator, given)


@pytest.mark.parametrize("name", ["input", "members", "b1", "w2", "b2"])
def test_a_tensor_that_is_missing_is_named_where_nothing_is_computed(name):
    meta = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in head().items()}
    with pytest.raises(RuntimeError, match=f"alphaext: {name} must be a tensor, got None"):
        call("head", meta | {name: None})


def test_meta_tensors_of_the_head_are_named():
    for name in ("weight", "bias", "members", "z", "w1", "b1", "w2", "b2"):
        with pytest.raises(RuntimeError, match=f"alphaext: {name} must be on the device of input, cpu, got meta"):
            call("head", head() | {name: head()[name].to("meta")})
    for name in ("grad_scores", "preactivation", "raw", "alpha", "logits"):
        with pytest.raises(RuntimeError, match=f"alphaext: {name} must be on the device of input, cpu, got meta"):
            call("head_backward", head_backward() | {name: head_backward()[name].to("meta")})


@pytest.mark.parametrize("operator", ["head", "head_backward", "trains_on", "train_epoch", "train_epoch_many", "validate"])
def test_a_tensor_on_a_gpu_meets_the_checks_in_every_build(operator):
    """A build for the CPU alone says what is missing, instead of the dispatcher's page of backends."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"alphaext::{operator}", "CUDA")
