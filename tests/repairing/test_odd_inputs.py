"""Whatever form features and labels come in, the result is that of the plain form, or an error that names them."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alphaext import add_classes, class_means, extract_features, recommend, repair, repair_model, split_classes
from alphaext.baselines import choose_few_bias, crt, discriminant, lws, ncm

GENERATOR = torch.Generator().manual_seed(0)
CENTRES = torch.randn(5, 6, generator=GENERATOR)
COUNTS = torch.tensor([30, 28, 25, 9, 7])
LABELS = torch.arange(5).repeat_interleave(COUNTS)
FEATURES = CENTRES[LABELS] + 0.5 * torch.randn(len(LABELS), 6, generator=GENERATOR)
LINEAR = nn.Linear(6, 5)
LINEAR.weight.data, LINEAR.bias.data = CENTRES.clone(), -CENTRES.square().sum(dim=1) / 2
SPLIT = split_classes(COUNTS, few_below=10, many_above=27)
NEW = torch.randn(6, 6, generator=GENERATOR), torch.tensor([5, 5, 5, 6, 6, 6])

SHORT = {"epochs": 1, "progress": False}
FUNCTIONS = {
    "class_means": lambda x, y: class_means(x, y, 5),
    "ncm": lambda x, y: ncm(x, y, 5).weight,
    "discriminant": lambda x, y: discriminant(x, y, 5, split=SPLIT).linear.weight,
    "crt": lambda x, y: crt(x, y, 5, lr=0.1, weight_decay=0.0, **SHORT).linear.weight,
    "lws": lambda x, y: lws(LINEAR, x, y, lr=0.1, weight_decay=0.0, **SHORT).linear.weight,
    "few_bias": lambda x, y: choose_few_bias(LINEAR, x, y, split=SPLIT).linear.bias,
    "repair": lambda x, y: repair(LINEAR, x, y, split=SPLIT, **SHORT).linear.weight,
    "repair, validation": lambda x, y: (
        repair(LINEAR, FEATURES, LABELS, val_features=x, val_labels=y, split=SPLIT, **SHORT).linear.weight
    ),
    "add_classes": lambda x, y: add_classes(LINEAR, x, y, *NEW, **SHORT).linear.weight,
    "add_classes, new": lambda x, y: (
        add_classes(LINEAR, FEATURES, LABELS, x, y + 5 if torch.is_tensor(y) else y, **SHORT).linear.weight
    ),
}
SLOW = {
    "recommend": lambda x, y: recommend(LINEAR, x, y, FEATURES, LABELS, split=SPLIT).linear.weight,
    "recommend, validation": lambda x, y: recommend(LINEAR, FEATURES, LABELS, x, y, split=SPLIT).linear.weight,
}


def _read_only(array):
    array.flags.writeable = False
    return array


# Forms of the same numbers.
FORMS = {
    "tensor": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every third": lambda x: x.repeat_interleave(3, dim=1)[:, ::3],
    "rows apart": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "gradient": lambda x: x.clone().requires_grad_(),
    "array": lambda x: x.numpy(),
    "columns first": lambda x: np.asfortranarray(x.numpy()),
    "backwards": lambda x: x.numpy()[::-1].copy()[::-1],
    "columns backwards": lambda x: x.numpy()[:, ::-1].copy()[:, ::-1],
    "big-endian": lambda x: x.numpy().astype(">f4"),
    "read-only": lambda x: _read_only(x.numpy().copy()),
    "masked": lambda x: np.ma.masked_array(x.numpy()),
}
LABEL_FORMS = {
    "int64": lambda y: y,
    "int32": lambda y: y.int(),
    "int16": lambda y: y.short(),
    "uint8": lambda y: y.byte(),
    "uint16 array": lambda y: y.numpy().astype(np.uint16),
    "big-endian": lambda y: y.numpy().astype(">i4"),
    "list": lambda y: y.tolist(),
    "tuple": lambda y: tuple(y.tolist()),
    "NumPy's numbers": lambda y: list(y.numpy()),
    "backwards": lambda y: y.numpy()[::-1].copy()[::-1],
    "every second": lambda y: y.repeat_interleave(2)[::2],
}
MODES = {"plain": contextlib.nullcontext, "inference": torch.inference_mode, "no gradient": torch.no_grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*list(FUNCTIONS)[:-1], "recommend", "recommend, validation"])
def test_forms_of_the_same_numbers(name):
    function = (FUNCTIONS | SLOW)[name]
    right = function(FEATURES, LABELS)

    @settings(max_examples=4 if name in SLOW else 25, deadline=None, derandomize=True)
    @given(form=st.sampled_from(list(FORMS)), of_labels=st.sampled_from(list(LABEL_FORMS)), mode=st.sampled_from(list(MODES)))
    def compare(form, of_labels, mode):
        with MODES[mode]():
            found = function(FORMS[form](FEATURES), LABEL_FORMS[of_labels](LABELS))
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)

    compare()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "add_classes, new"])
def test_other_precisions(name, dtype):
    # The same numbers in each of the dtypes, so that nothing but sums is rounded otherwise.
    exact = FEATURES.bfloat16().to(torch.float16)
    assert torch.equal(exact.float(), exact.to(dtype).float()) or dtype == torch.bfloat16
    found, right = (FUNCTIONS[name](values, LABELS) for values in (exact.to(dtype), exact.to(dtype).float()))
    torch.testing.assert_close(found.float(), right, rtol=1e-3, atol=1e-3)


def _with(value):
    changed = FEATURES.clone()
    changed[3, 1] = value
    return changed


WRONG = {
    "integers": FEATURES.long(),
    "truths": FEATURES > 0,
    "uint8": FEATURES.abs().byte(),
    "complex": FEATURES.cfloat(),
    "NaN": _with(float("nan")),
    "infinity": _with(float("inf")),
    "none": FEATURES[:0],
    "one dimension": FEATURES[:, 0],
    "three dimensions": FEATURES[:, None],
    "objects": FEATURES.numpy().astype(object),
    "texts": FEATURES.numpy().astype(str),
    "text": "features",
    "ragged": [[1.0, 2.0], [3.0]],
    "sparse": FEATURES.to_sparse(),
    "meta": FEATURES.to("meta"),
    "long double": FEATURES.numpy().astype(np.longdouble),
}
WRONG_LABELS = {
    "floats": LABELS.float(),
    "truths": LABELS > 0,
    "a column": LABELS[:, None],
    "one-hot": nn.functional.one_hot(LABELS),
    "one less": LABELS[:-1],
    "below 0": LABELS - 1,
    "beyond": LABELS + 7,
    "texts": [str(label) for label in LABELS.tolist()],
    "none": LABELS[:0],
    "one number": LABELS[0],
    "objects": LABELS.numpy().astype(object),
    "sparse": LABELS.to_sparse(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FUNCTIONS, *SLOW])
def test_what_is_wrong_is_named(name):
    function = (FUNCTIONS | SLOW)[name]
    for what, features in WRONG.items():
        if name == "class_means" and what == "none":
            continue  # means of nothing are 0
        with pytest.raises((TypeError, ValueError), match="features|labels"):
            function(features, LABELS)
            pytest.fail(what)
    for what, labels in WRONG_LABELS.items():
        if name == "add_classes, new" and what in ("truths", "sparse"):
            continue  # five more are numbers
        if name in ("class_means", "add_classes, new") and what in ("none", "beyond"):
            continue
        with pytest.raises((TypeError, ValueError), match="labels|few"):
            function(FEATURES, labels)
            pytest.fail(what)


MODEL = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
IMAGES = torch.randn(len(LABELS), 1, 8, 8, generator=GENERATOR) + LABELS[:, None, None, None]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    form=st.sampled_from([name for name in FORMS if name not in ("transposed", "every third", "columns first", "masked")]),
    of_labels=st.sampled_from([*LABEL_FORMS, "a column"]),
    mode=st.sampled_from(list(MODES)),
)
def test_forms_of_a_models_inputs(form, of_labels, mode):
    labels = LABELS[:, None] if of_labels == "a column" else LABEL_FORMS[of_labels](LABELS)
    with MODES[mode]():
        found = extract_features(MODEL, (FORMS[form](IMAGES), labels), progress=False)
    right = extract_features(MODEL, (IMAGES, LABELS), progress=False)
    np.testing.assert_allclose(found.features, right.features, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, right.labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.to_sparse(), LABELS, "data must be a dense tensor, got torch.sparse_coo"),
        (IMAGES.to("meta"), LABELS, 'inputs must hold numbers, got a tensor on device "meta"'),
        (IMAGES.long(), LABELS, r"the model, a Sequential, cannot take inputs \[64, 1, 8, 8\]"),
        (IMAGES, LABELS > 1, "labels must be integers, got torch.bool"),
        (IMAGES, LABELS[:-1], "one entry a sample in each array"),
        (IMAGES[:0], LABELS[:0], "at least one batch, got none"),
    ],
    ids=["sparse", "meta", "integers", "truths", "one less", "none"],
)
def test_a_models_inputs_that_are_wrong_are_named(images, labels, message):
    for use in (extract_features, repair_model):
        with pytest.raises((TypeError, ValueError), match=message):
            use(MODEL, (images, labels), progress=False)
