"""Attacks on the package, each a function of what hypothesis draws: it returns what came of the attack, or fails.

Nothing may crash, hang, raise an error of another kind than bad input is answered with, or be wrong in silence.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from problems import DTYPES, Problem, assert_close, make_problem, reference_scores
from test_operator_checks import OPERATORS, call
from torch import Tensor, nn

from alphaext import ops, reference
from alphaext.checkpoints import export, read_checkpoint, save_linear, undo, write_repaired
from alphaext.commands.extract import Extract
from alphaext.commands.fit import Fit
from alphaext.commands.options import read_config
from alphaext.data import read_arrays, read_list, write_list
from alphaext.features import read_features, write_features
from alphaext.ops import training
from alphaext.utils.files import read_json, remove_leftovers, write_json
from alphaext.utils.resume import ResumableTraining
from alphaext.utils.tensors import as_tensor, check_whole

# Operators


_SIZES = st.one_of(
    st.integers(1, 6), st.sampled_from([8, 15, 16, 17, 31, 33, 64, 67])
)  # around the widths of vectors and tiles


def operator_against_reference(data: st.DataObject) -> list[str]:
    """The head and its gradient, of any shapes, dtype and strides, by every rule, against the reference in double precision.

    hypothesis draws the shapes, and the rest comes from a seed: drawing takes longer than the calls.
    """
    in_features, hidden, pca_dim, batch, num_few = (data.draw(sizes) for sizes in (_SIZES, _SIZES, *[st.integers(1, 6)] * 3))
    number = data.draw(st.integers(0, 2**31))
    dice = random.Random(number)
    outcomes = []
    for _ in range(CALLS // (len(_RULES) + 1)):
        num_classes = num_few + dice.choice([1, 2, 5, 30])
        dtype = dice.choice(DTYPES)
        problem = make_problem(
            in_features=in_features,
            pca_dim=pca_dim,
            hidden=hidden,
            batch=dice.choice([0, batch, batch, 4 * batch + 1]),
            num_few=num_few,
            num_classes=num_classes,
            top_k=dice.randint(1, min(6, num_classes - 1)),
            first_layer=dice.choice(["separate", "shared", "factored"]),
            bias=dice.random() < 0.5,
            from_logits=dice.random() < 0.5,
            shared_second_layer=dice.random() < 0.5,
            dtype=dtype,
            seed=dice.getrandbits(31),
        ).map(dice.choice([lambda x: x, _every_other, _by_columns]))
        exact = problem.map(Tensor.double)
        for rule, projected in _RULES:
            options = {"rule": rule, "gamma": dice.choice([0.3, 0.7, 1.0]), "projected_gradient": projected}
            outcomes.append(_against_reference(problem.requires_grad(), exact.requires_grad(), dtype, options))
        outcomes.append(_validation_against_reference(num_few, num_classes, dice))
    return outcomes


CALLS = 40
"""Of operators in one example."""

_RULES = [("clamp", False), ("clamp", True), ("softmax", False), ("l1", False)]


def _against_reference(given: Problem, exact: Problem, dtype: torch.dtype, options: dict[str, Any]) -> str:
    expected = reference_scores(exact, **options)
    scores = ops.alpha_head(*given.tensors(), **options)
    assert scores.dtype == dtype and scores.shape == expected.shape
    _compare(scores, expected, dtype, "scores", 4)
    if _near_a_kink(exact, options["gamma"], options["rule"]):
        return "scores equal"
    weights = torch.linspace(-1, 1, expected.numel()).to(dtype).reshape(expected.shape)
    expected.backward(weights.double())
    scores.backward(weights)
    for name, tensor in exact.floating().items():
        if tensor.grad is not None:
            _compare(getattr(given, name).grad, tensor.grad, dtype, f"gradient of {name}", 20)
    return "scores and gradients equal"


def _validation_against_reference(num_few: int, num_classes: int, dice: random.Random) -> str:
    """What is kept of validation samples' logits, and who is recognised, against whole scores."""
    generator = torch.Generator().manual_seed(dice.getrandbits(31))
    rows, columns = dice.choice([1, 7, 63, 64, 65, 200]), num_classes
    dtype = dice.choice([torch.float32, torch.float64])
    logits = torch.randn(rows, num_classes, generator=generator, dtype=dtype)
    labels = torch.randint(num_classes, (rows,), generator=generator)
    few = torch.randperm(num_classes, generator=generator)[:num_few]
    penalty = torch.zeros(num_classes, dtype=dtype).index_fill(0, few, -torch.inf)
    bias = torch.randn(columns, generator=generator, dtype=dtype)
    kept = []
    for keep in (training.cache_logits, training.cache_logits_elsewhere):
        blocks, sums, own = logits.new_zeros(training.validation_shape(rows, columns)), *logits.new_zeros(2, rows)
        top = logits.new_zeros(rows, training.TOP_CLASSES), torch.zeros(rows, training.TOP_CLASSES, dtype=torch.int32)
        keep(logits, labels, penalty, torch.arange(columns), bias, blocks, sums, own, *top)
        kept.append((blocks, sums, own, *top))
    for name, here, there in zip(("member logits", "log-sum-exp", "label's logit", "top", "ids"), *kept, strict=True):
        if name == "log-sum-exp":
            _compare(here, there.double(), dtype, name, 1)
        else:
            assert torch.equal(here, there), name
    blocks, _, own, *top = kept[0]
    alpha = torch.randn(num_few, 3, generator=generator, dtype=dtype)
    members = torch.randint(columns, (num_few, 3), generator=generator, dtype=torch.int32)
    few_of_label = torch.full((num_classes,), -1, dtype=torch.int32).index_copy(
        0, few, torch.arange(num_few, dtype=torch.int32)
    )
    counts = training.validate(alpha, members, few.int(), blocks, own, *top, labels, few_of_label[labels], num_classes)
    mixed = ((logits - bias).double()[:, members.long()] * alpha.double()).sum(2)
    scores = logits.double().index_copy(1, few, mixed)
    mine = scores.gather(1, labels[:, None])
    if bool(((scores - mine).abs() < 1e-4).sum() > rows):  # two scores so near each other that rounding decides their order
        return "validation logits equal"
    rank = (scores > mine).sum(1)
    hits = torch.stack([torch.bincount(labels[rank < k], minlength=num_classes) for k in (1, 5)])
    assert torch.equal(counts, hits), f"recognised: {counts.tolist()}, by whole scores {hits.tolist()}"
    return "validation equal"


def _near_a_kink(problem: Problem, gamma: float, rule: str) -> bool:
    """Whether rounding decides which of two gradients is taken."""
    with torch.no_grad():
        before = problem.b1 if problem.w1 is None else reference.preactivations(problem.z, problem.w1, problem.b1)
        raw = reference.raw_outputs(before, problem.w2, problem.b2)
        kinks = [before]
        if rule == "softmax":
            shares = raw.softmax(1)
            kinks += [shares[:, :1] - gamma, shares[:, 1:] - (1 - gamma) / (raw.shape[1] - 1)]
        else:
            kinks += [raw[:, 1:]] if rule == "l1" else [raw[:, :1], raw[:, :1] - reference.ALPHA_FLOOR, raw[:, :1] - gamma]
        return any(bool((kink.abs() < 1e-5).any()) for kink in kinks)


def _compare(actual: Tensor | None, expected: Tensor, dtype: torch.dtype, name: str, factor: float) -> None:
    assert actual is not None, name
    if not torch.equal(actual.double(), expected):  # where they are equal, which is often, nothing need be said
        assert_close(actual, expected, dtype, name, factor)


def _every_other(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def _by_columns(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def hostile_operator(data: st.DataObject) -> str:
    """A call of any operator with some arguments that do not belong there."""
    name = data.draw(st.sampled_from(sorted(OPERATORS)))
    given = OPERATORS[name]()
    for argument in data.draw(st.lists(st.sampled_from(sorted(given)), min_size=1, max_size=3, unique=True)):
        given[argument] = data.draw(st.sampled_from(_HOSTILE), argument)(given[argument])
    try:
        call(name, given)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, OverflowError):
        return "refused"
    return "taken"


def _tensors_only(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda value: change(value) if isinstance(value, Tensor) else value


_HOSTILE: list[Callable[[Any], Any]] = [
    _tensors_only(lambda x: x[None]),
    _tensors_only(lambda x: x[:0]),
    _tensors_only(lambda x: x[..., :-1]),
    _tensors_only(lambda x: torch.cat([x, x])),
    _tensors_only(lambda x: x.to(torch.float16)),
    _tensors_only(lambda x: x.to(torch.int32)),
    _tensors_only(lambda x: x.to("meta")),
    _tensors_only(lambda x: torch.empty(0, dtype=x.dtype)),
    _tensors_only(lambda x: x.flatten()[0] if x.numel() else x),
    _tensors_only(lambda x: _every_other(x)),
    _tensors_only(lambda x: x.flatten()[:1].expand(2**20).reshape(2**20, *[1] * max(0, x.dim() - 1)) if x.numel() else x),
    _tensors_only(lambda x: torch.full_like(x, 2**31 - 1) if x.dtype != torch.float64 else torch.full_like(x, float("nan"))),
    _tensors_only(lambda x: -x - 1),
    _tensors_only(lambda x: x.to_sparse() if x.dim() and x.is_floating_point() else x),
    lambda _: None,
    lambda _: "text",
    lambda x: 2**62 if isinstance(x, int) else x,
    lambda x: -1 if isinstance(x, (int, float)) else x,
    lambda x: float("nan") if isinstance(x, float) else x,
]

# Files


class Original:
    """A folder with a file of each kind, whole, and how each is read: as a value that can be compared.

    Attributes:
        files: the bytes of each file, by its name.
        checked: those that carry checksums, so that damage cannot go unnoticed.
    """

    checked = ("zip.pth", "arrays.npz", "new.pth.undo.npz", "features/features.npy", "features/labels.npy", "features/sums.npy")

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.folder = Path(self._folder.name)
        torch.manual_seed(0)
        linear, folder = nn.Linear(6, 5), self.folder
        state = {"conv.weight": torch.randn(6, 3, 1, 1), "fc.weight": linear.weight.detach(), "fc.bias": linear.bias.detach()}
        torch.save({"epoch": 3, "state_dict": state}, folder / "zip.pth")
        torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
        save_linear(linear, folder / "m.safetensors")
        np.savez(folder / "arrays.npz", x=np.arange(48, dtype=np.uint8).reshape(3, 4, 4), y=[0, 1, 1])
        write_list(folder / "list.txt", ["a/1.png", "b/2.png"], [0, 1])
        write_features(folder / "features", torch.randn(7, 4), [0, 1, 2, 0, 1, 2, 0], num_classes=3)
        write_json(folder / "value.json", {"a": [1, 2.5, None], "b": {"c": "d"}})
        (folder / "fit.toml").write_text('[fit]\nepochs = 3\nlr = 0.1\n[model]\nbackbone = "small"\n')
        training = ResumableTraining("one of a test's", {})
        training.identity = {"seed": 1}
        training.add_epoch({"epoch": 1, "loss": 0.5}, 0.7)
        training.save(folder / "resume.pt")
        checkpoint = read_checkpoint(folder / "zip.pth")
        changed = checkpoint.linear()
        with torch.no_grad():
            changed.weight[3] += 1
        export(checkpoint, changed, [3], folder / "new.pth", keep_original=True)
        readers: dict[str, Callable[[Path], Any]] = {
            "zip.pth": _checkpoint,
            "legacy.pth": _checkpoint,
            "m.safetensors": _checkpoint,
            "arrays.npz": lambda path: [read_arrays(path).pixels.tobytes(), read_arrays(path).labels.tolist()],
            "list.txt": lambda path: [read_list(path, path.parent).paths, read_list(path, path.parent).labels.tolist()],
            "features/features.npy": _features,
            "features/labels.npy": _features,
            "features/sums.npy": _features,
            "features/features.json": _features,
            "value.json": lambda path: read_json(path, "a value"),
            "fit.toml": lambda path: read_config(path, [Extract, Fit]),
            "resume.pt": _resumed,
            "new.pth.undo.npz": _undone,
        }
        self.readers = readers
        self.files = {name: (folder / name).read_bytes() for name in readers}
        self.values = {name: reader(folder / name) for name, reader in readers.items()}


def _checkpoint(path: Path) -> Any:
    found = read_checkpoint(path)
    return [found.weight.numpy().tobytes(), {name: tensor.numpy().tobytes() for name, tensor in found.backbone.items()}]


def _features(path: Path) -> Any:
    found = read_features(path.parent)
    check_whole(found.features)
    return [np.asarray(found.features).tobytes(), found.labels.tolist(), found.num_classes]


def _resumed(path: Path) -> Any:
    training = ResumableTraining("one of a test's", {})
    training.identity = {"seed": 1}
    training.load(path)
    return [training.history, training.selected_epoch]


def _undone(path: Path) -> Any:
    target = path.with_name("again.pth")
    try:
        undo(path.with_name("new.pth"), target, overwrite=True)
        return target.read_bytes()
    finally:
        target.unlink(missing_ok=True)


def _damaged(content: bytes, data: st.DataObject) -> bytes:
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zeros", "repeat", "drop"]))
    at = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 64))
    part = content[at : at + length]
    new = {
        "flip": bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 : at + length],
        "cut": b"",
        "insert": data.draw(st.binary(min_size=1, max_size=16)) + part,
        "zeros": bytes(len(part)),
        "repeat": part * 2,
        "drop": b"",
    }[kind]
    return content[:at] + new + (b"" if kind == "cut" else content[at + length :])


def damaged_file(data: st.DataObject, original: Original) -> str:
    """A file of any kind with some bytes changed: refused in the one way, or read as it was; else wrong where it is checked."""
    name = data.draw(st.sampled_from(sorted(original.files)))
    damaged = _damaged(original.files[name], data)
    path = original.folder / name
    path.write_bytes(damaged)
    try:
        value = original.readers[name](path)
    except (ValueError, TypeError, OSError):
        return f"{name}: refused"
    finally:
        path.write_bytes(original.files[name])
    if repr(value) == repr(original.values[name]):
        return f"{name}: the same"
    assert name not in original.checked, f"{name} was read otherwise, without a word"
    return f"{name}: other content"


# Kills


def killed_writer(data: st.DataObject, folder: Path) -> str:
    """A process that writes files again and again is killed: each file is whole, old or new, and the next run clears up."""
    step = data.draw(st.sampled_from(sorted(_WRITERS)))
    delay = data.draw(st.floats(0, 0.03))
    _WRITERS[step](folder, 0)
    child = os.fork()
    if child == 0:
        try:
            for number in range(1, 100_000):
                _WRITERS[step](folder, number)
        finally:
            os._exit(1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _READERS[step](folder)
    remove_leftovers(folder)  # as every command does with its folder
    _WRITERS[step](folder, 0)
    left = [entry.name for entry in folder.iterdir() if entry.name.endswith(".tmp")]
    assert left == [], f"left over after the next run: {left}"
    return step


def _linear(number: int) -> nn.Linear:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.fill_(number + 1.0)
        layer.bias.fill_(number + 1.0)
    return layer


def _write_repaired(folder: Path, number: int) -> None:
    path = folder / "model.pth"
    if number == 0:
        torch.save({"conv.weight": torch.ones(4, 3, 1, 1), **_prefixed(_linear(0))}, path)
    checkpoint = read_checkpoint(path)
    linear = checkpoint.linear()
    with torch.no_grad():
        linear.weight[1], linear.bias[1] = number + 2.0, number + 2.0
    write_repaired(checkpoint, linear, [1], path, overwrite=True)


def _prefixed(layer: nn.Linear) -> dict[str, Tensor]:
    return {f"fc.{name}": tensor.detach() for name, tensor in layer.named_parameters()}


def _one_value(*tensors: Tensor) -> None:
    values = torch.cat([tensor.flatten() for tensor in tensors]).unique()
    assert len(values) == 1, f"a file of two versions: {values.tolist()}"


def _check_repaired(folder: Path) -> None:
    checkpoint = read_checkpoint(folder / "model.pth")
    assert checkpoint.bias is not None
    _one_value(checkpoint.weight[1], checkpoint.bias[1])


def _check_linear(folder: Path, name: str) -> None:
    checkpoint = read_checkpoint(folder / name)
    assert checkpoint.bias is not None
    _one_value(checkpoint.weight, checkpoint.bias)


def _check_json(folder: Path) -> None:
    value = read_json(folder / "value.json", "a value")
    assert set(value["many"]) == {value["number"]}


_WRITERS: dict[str, Callable[[Path, int], None]] = {
    "write_repaired": _write_repaired,
    "save_linear": lambda folder, number: save_linear(_linear(number), folder / "linear.pth", overwrite=True),
    "save_linear, safetensors": lambda folder, number: save_linear(_linear(number), folder / "l.safetensors", overwrite=True),
    "write_json": lambda folder, number: write_json(folder / "value.json", {"number": number, "many": [number] * 5000}),
    "write_list": lambda folder, number: write_list(
        folder / "list.txt", [f"{number}/{i}.png" for i in range(2000)], [number % 7] * 2000, overwrite=True
    ),
    "write_features": lambda folder, number: _write_features(folder, number),
    "resume file": lambda folder, number: _resumable(number).save(folder / "resume.pt", numbers=torch.full((2000,), number)),
}
_READERS: dict[str, Callable[[Path], None]] = {
    "write_repaired": _check_repaired,
    "save_linear": lambda folder: _check_linear(folder, "linear.pth"),
    "save_linear, safetensors": lambda folder: _check_linear(folder, "l.safetensors"),
    "write_json": _check_json,
    "write_list": lambda folder: _check_list(folder),
    "write_features": lambda folder: _check_features(folder),
    "resume file": lambda folder: _check_resumed(folder),
}


def _write_features(folder: Path, number: int) -> None:
    shutil.rmtree(folder / "old", ignore_errors=True)
    if (folder / "features").exists():
        os.rename(folder / "features", folder / "old")  # at once: removing it file by file could be cut short
    (folder / "features").mkdir()
    write_features(folder / "features", torch.full((50, 20), float(number)), [number % 3] * 50, num_classes=3)


def _check_features(folder: Path) -> None:
    if (folder / "features" / "features.json").exists():
        found = read_features(folder / "features")
        _one_value(as_tensor(found.features, "features"))
        _one_value(found.labels)
    else:
        assert not any((folder / "features").glob("*")), "features half written"


def _resumable(number: int) -> ResumableTraining:
    kept = ResumableTraining("one of a test's", {"numbers": Tensor})
    kept.identity = {"seed": 1}
    kept.add_epoch({"epoch": 1, "loss": float(number)}, float(number))
    return kept


def _check_resumed(folder: Path) -> None:
    kept = _resumable(0)
    _one_value(kept.load(folder / "resume.pt")["numbers"], torch.tensor([int(kept.history[0]["loss"])]))


def _check_list(folder: Path) -> None:
    images = read_list(folder / "list.txt", folder)
    assert len(images) == 2000 and len(set(images.labels.tolist())) == 1 and len({path[0] for path in images.paths}) == 1
