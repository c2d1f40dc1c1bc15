"""Features of a model's own data, and the model repaired: every kind of model, batch and data set."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

import alphaext
from alphaext import extract_features, repair_model
from alphaext.models import SmallConvNet

LABELS = torch.tensor([0] * 12 + [1] * 8 + [2] * 3)
TABLE = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))


class Table(nn.Module):
    """A model of tables that takes its input by a name of its own, and returns an object with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))

    def forward(self, rows: Tensor, scale: Tensor | None = None) -> SimpleNamespace:
        rows = rows if scale is None else rows * scale
        return SimpleNamespace(loss=None, logits=self.head(self.body(rows)))


class Rows(Dataset):
    classes = ("ant", "bee", "cat")

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return TABLE[index], int(LABELS[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Rows()[index] for index in range(len(LABELS)))


@dataclass
class Record:
    rows: Tensor
    label: Tensor


Named = namedtuple("Named", ["rows", "target"])


class Graph:
    """What goes into a model whole."""

    def __init__(self, rows: Tensor, y: Tensor) -> None:
        self.rows, self.y = rows, y


KINDS = {
    "loader": DataLoader(TensorDataset(TABLE, LABELS), batch_size=5),
    "data set": Rows(),
    "stream": Stream(),
    "arrays": (TABLE.numpy().astype(np.float64), LABELS.numpy()),
    "named arrays": {"rows": TABLE, "labels": LABELS},
    "named and apart": ({"rows": TABLE.numpy()}, LABELS[:, None]),
    "batches by name": [{"rows": TABLE, "label": LABELS, "file": ["x"] * 23}],
    "another name": [{"anything": TABLE, "y": LABELS}],
    "records": [Record(TABLE[:9], LABELS[:9]), Record(TABLE[9:], LABELS[9:])],
    "named tuples": (Named(TABLE[start : start + 7], LABELS[start : start + 7]) for start in range(0, 23, 7)),
    "several inputs": [(TABLE, torch.ones(6), LABELS)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind):
    torch.manual_seed(1)
    model = Table().train()
    with torch.no_grad():
        expected = model.body.eval()(TABLE)
    model.train()
    found = extract_features(model, KINDS[kind], batch_size=4)
    torch.testing.assert_close(torch.from_numpy(found.features), expected)
    assert found.labels.equal(LABELS) and found.num_classes == 3 and found.metadata["classifier"] == "head.1"
    assert all(module.training for module in model.modules())
    assert found.class_names == (Rows.classes if kind == "data set" else None)


def test_samples_may_come_in_any_order():
    data = DataLoader(Rows(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(0))
    model = Table().eval()
    found = extract_features(model, data)
    assert found.class_names == Rows.classes and not found.labels.equal(LABELS)
    assert found.class_counts().equal(LABELS.bincount())
    for row, label in zip(found.features, found.labels, strict=True):
        with torch.no_grad():
            own = model.body(TABLE[label == LABELS])
        assert (own - torch.from_numpy(row)).abs().max(dim=1).values.min() < 1e-6


class Augmented(Rows):
    transform = SimpleNamespace(transforms=[nn.Identity(), SimpleNamespace(transforms=[type("RandomCrop", (), {})()])])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataLoader(Rows(), batch_size=5, drop_last=True), "drop_last=True and leaves out 3 of 23 samples"),
        (
            DataLoader(Rows(), batch_size=5, sampler=WeightedRandomSampler([1.0] * 23, 23)),
            "WeightedRandomSampler draws .* with",
        ),
        (DataLoader(Subset(Augmented(), range(23)), batch_size=5), r"augments its images \(RandomCrop\)"),
    ],
)
def test_a_loader_that_does_not_give_each_sample_once_as_tested(data, said):
    with pytest.warns(UserWarning, match=said) as caught:
        found = extract_features(Table(), data)
    assert caught[0].filename == __file__ and found.class_names == Rows.classes


def test_the_place_of_the_labels_in_a_tuple():
    data = [(TABLE, LABELS, torch.arange(23) + 900)]
    with pytest.raises(ValueError, match="entries the last is taken for the labels; label_name=1 takes the second"):
        extract_features(Table(), data)
    assert extract_features(Table(), data, label_name=1).labels.equal(LABELS)
    with pytest.raises(ValueError, match="label_name must be .*2.*got 3"):
        extract_features(Table(), data, label_name=3)


def test_an_object_goes_into_the_model_whole():
    class OfGraphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, graph: Graph) -> Tensor:
            return self.fc(graph.rows)

    found = extract_features(OfGraphs(), [Graph(TABLE, LABELS)])
    assert np.array_equal(found.features, TABLE.numpy())


def test_a_sequence_is_read_where_the_model_reads_it():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.score = nn.Embedding(50, 8), nn.Linear(8, 3, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            scores = self.score(self.embedding(ids).cumsum(dim=1))
            return scores[torch.arange(len(ids)), (ids > 0).sum(dim=1) - 1]

    ids = torch.randint(1, 50, (23, 7))
    ids[:5, 4:] = 0
    model = Last()
    found = extract_features(model, (ids, LABELS))
    with torch.no_grad():
        torch.testing.assert_close(model.score(torch.from_numpy(found.features)), model(ids))


def test_classes_to_repair_are_named():
    torch.manual_seed(2)
    found = extract_features(Table(), Rows())
    by_name = alphaext.repair(nn.Linear(5, 3), found, few_classes=["bee", "cat"], epochs=1)
    assert by_name.split.few.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"few_classes must name classes, 'Bees' is none; did you mean 'bee'\?"):
        alphaext.repair(nn.Linear(5, 3), found, few_classes=["Bees"], epochs=1)
    with pytest.raises(ValueError, match="few_classes must be ids where classes have no names"):
        alphaext.repair(nn.Linear(5, 3), found.features, found.labels, few_classes="bee", epochs=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_repaired_and_stays_as_it_was(dtype):
    torch.manual_seed(2)
    model = SmallConvNet(3).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.randn(90, 3, 16, 16), torch.arange(3).repeat_interleave(torch.tensor([60, 25, 5]))
    made = repair_model(model, (images, labels), (images, labels), epochs=2)
    assert made.classifier == "fc" and made.train.features.shape == (90, 192)
    assert set(made.after) == {"few", "medium", "many", "all"} and "1 of 3 classes are few; top-1 in %" in str(made)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(made.model.fc.weight[:2], model.fc.weight[:2]) and made.model.fc.weight.dtype == dtype
    scores = made.model.eval()(images.to(dtype)).float()
    torch.testing.assert_close(
        scores[:, 2], made.repair.linear(torch.from_numpy(made.train.features))[:, 2], rtol=0.1, atol=0.1
    )
    # Its features do for another repair.
    again = repair_model(model, made.train, made.val, epochs=2)
    assert torch.equal(again.model.fc.weight, made.model.fc.weight)


def test_features_are_taken_in_place_of_arrays(tmp_path):
    found = extract_features(Table(), (TABLE, LABELS))
    assert torch.equal(alphaext.class_means(found), alphaext.class_means(found.features, found.labels))
    linear = nn.Linear(5, 3)
    one = alphaext.repair(linear, found, val_features=found, few_below=5, many_above=10, epochs=1)
    two = alphaext.repair(
        linear, found.features, found.labels, val_features=found.features, val_labels=found.labels,
        few_below=5, many_above=10, epochs=1,
    )  # fmt: skip
    assert torch.equal(one.linear.weight, two.linear.weight) and one.result.after == two.result.after
    assert alphaext.metrics.predict(linear, found).predicted.shape == (23,)
    of_labels = alphaext.doctor.check_classifier_order(linear, found)
    assert of_labels == alphaext.doctor.check_classifier_order(linear, found.features, found.labels)
    added = (TABLE[:4, :5], torch.tensor([3, 3, 4, 4]))
    new = alphaext.features.Features(added[0].numpy(), added[1], 5, None, {})
    pair = [
        alphaext.add_classes(linear, *data, epochs=1).linear for data in ((found, None, new), (found.features, LABELS, *added))
    ]
    assert torch.equal(pair[0].weight, pair[1].weight)
    kept = alphaext.features.write_features(tmp_path / "train", found)
    assert np.array_equal(kept.features, found.features) and kept.num_classes == 3 and kept.labels.equal(LABELS)
    with pytest.raises(ValueError, match="features and labels must be given together"):
        alphaext.repair(linear, found.features)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_model_that_knows_nothing_of_its_data_is_warned_of(shift, recwarn):
    labels = torch.arange(3).repeat_interleave(torch.tensor([150, 60, 10]))
    rows = 6 * torch.eye(3)[labels] + torch.randn(220, 3)
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3))
    nn.init.eye_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    made = repair_model(model, (rows, (labels + shift) % 3), epochs=1, few_classes=[2])
    said = [str(warning.message) for warning in recwarn if "chance" in str(warning.message)]
    assert bool(said) == bool(shift) and made.train.num_classes == 3
    assert not said or ("of 220 training samples the model knows" in said[0] and recwarn[0].filename == __file__)


def test_a_bias_that_the_model_has_no_place_for_is_warned_of(recwarn):
    torch.manual_seed(5)
    labels = torch.arange(3).repeat_interleave(torch.tensor([150, 60, 15]))
    rows = 2 * torch.eye(3)[labels] + torch.randn(225, 3)
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3, bias=False))
    nn.init.eye_(model[1].weight)
    model[1].weight.data[2] *= 0.3
    made = repair_model(model, (rows, labels), (rows, labels), epochs=3)
    said = [str(warning.message) for warning in recwarn if "has no bias" in str(warning.message)]
    assert made.model[1].bias is not None and "the layer '1' has no bias and the repaired one has" in said[0]


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.fc(rows).softmax(dim=1)


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (Table(), [], {}, ValueError, "at least one batch"),
        (Table(), [(TABLE,)], {}, ValueError, "inputs and labels, got a tuple of 1"),
        (Table(), [{"rows": TABLE}], {}, ValueError, "must have labels or .*got rows; label_name"),
        (Table(), [object()], {}, ValueError, "an attribute labels"),
        (Table(), (TABLE, LABELS[:5]), {}, ValueError, "one entry a sample in each array, got 23 and 5"),
        (Table(), [(TABLE, LABELS[:5])], {}, ValueError, "one label a sample, got 5 labels and 23"),
        (Table(), (TABLE, LABELS + 1), {}, ValueError, "labels must be in 0..2, got 3"),
        (Table(), (TABLE, LABELS.float()), {}, TypeError, "labels must be integers"),
        (Table(), TABLE, {}, TypeError, "data must be a DataLoader .*got Tensor"),
        (Table(), "train", {}, TypeError, "got str"),
        ("model", (TABLE, LABELS), {}, TypeError, "model must be Module"),
        (Table(), (TABLE[:, :5], LABELS), {}, ValueError, r"a Table, cannot take inputs \[23, 5\]: RuntimeError"),
        (Table(), {"row": TABLE, "scale": TABLE, "y": LABELS}, {}, ValueError, r"cannot take row: inputs .*missing .*'rows'"),
        (Table(), [(TABLE, LABELS, ["a.jpg"] * 23)], {}, ValueError, "of a batch's entries the last is taken for the labels"),
        (Table(), [(TABLE, TABLE, ["a.jpg"] * 23)], {}, TypeError, "of a batch of 3 entries the last is taken for the labels"),
        (nn.Flatten(), (TABLE, LABELS), {}, ValueError, "must have parameters"),
        (Softmax(), (TABLE, LABELS), {}, ValueError, "softmax or a scale may follow.*'fc'"),
        (Softmax(), (TABLE, LABELS), {"classifier": "fc"}, ValueError, "is not the plain linear layer"),
        (Table(), (TABLE, LABELS), {"classifier": "head"}, ValueError, "'head' is a Sequential. .*'head.1'"),
        (Table(), (TABLE, LABELS), {"num_classes": 4}, ValueError, "that of the model's classifier, 3, got 4"),
        (Table(), (TABLE * torch.nan, LABELS), {}, ValueError, "features must be finite"),
    ],
)
def test_what_does_not_fit_is_named(model, data, options, error, message):
    with pytest.raises(error, match=message):
        extract_features(model, data, **options)


# ---- Hugging Face ------------------------------------------------------------------------------------------------------


def tiny(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**small, "vocab_size": 60, "num_labels": 3, "max_position_embeddings": 40, "pad_token_id": 0}
    torch.manual_seed(3)
    if kind == "vit":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(**small, image_size=16, patch_size=8, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
        )
    names = {"bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2", "llama": "Llama"}
    if kind == "gpt2":
        text = {
            "vocab_size": 60,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "num_labels": 3,
            "pad_token_id": 0,
            "n_positions": 40,
        }
    config = getattr(transformers, f"{names[kind]}Config")(**text)
    return getattr(transformers, f"{names[kind]}ForSequenceClassification")(config)


@pytest.mark.parametrize("kind", ["vit", "bert", "roberta", "gpt2", "llama"])
def test_models_of_hugging_face(kind):
    model = tiny(kind).eval()
    torch.manual_seed(4)
    if kind == "vit":
        data = {"pixel_values": torch.randn(23, 3, 16, 16), "labels": LABELS}
    else:
        ids = torch.randint(2, 60, (23, 9))
        ids[:6, 5:] = 0
        data = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": LABELS}
    made = repair_model(model, data, data, few_below=5, many_above=10, epochs=1, batch_size=8)
    layer = model.get_submodule(made.classifier)
    inputs = {name: value for name, value in data.items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.from_numpy(made.train.features)), model(**inputs).logits, rtol=1e-4, atol=1e-5)
        base = made.model.eval()(**inputs).logits[:, :2]
        torch.testing.assert_close(base, model(**inputs).logits[:, :2])
    assert made.train.class_names == (("a", "b", "c") if kind == "vit" else None)
