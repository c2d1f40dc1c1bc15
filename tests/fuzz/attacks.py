"""Attacks on the package, each a function of what hypothesis draws: it returns what came of the attack, or fails.

Nothing may crash, hang, raise an error of another kind than bad input is answered with, or be wrong in silence.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from problems import DTYPES, assert_close, make_problem, reference_scores
from test_operator_checks import OPERATORS, call
from torch import Tensor, nn

from alphaext import ops
from alphaext.checkpoints import export, read_checkpoint, save_linear, undo, write_repaired
from alphaext.commands.extract import Extract
from alphaext.commands.fit import Fit
from alphaext.commands.options import read_config
from alphaext.data import read_arrays, read_list, write_list
from alphaext.features import read_features, write_features
from alphaext.utils.files import read_json, remove_leftovers, write_json
from alphaext.utils.resume import ResumableTraining

# Operators


def operator_against_reference(data: st.DataObject) -> str:
    """The head and its gradient, of any shapes, dtype and strides, against the plain reference in double precision."""
    sizes = {name: st.integers(1, 6) for name in ("in_features", "pca_dim", "hidden")}
    options: dict[str, Any] = {name: data.draw(size, name) for name, size in sizes.items()}
    options |= {"batch": data.draw(st.integers(0, 5)), "num_few": data.draw(st.integers(1, 4))}
    options["num_classes"] = options["num_few"] + data.draw(st.integers(1, 6))
    options["top_k"] = data.draw(st.integers(1, options["num_classes"] - 1))
    options |= {"first_layer": data.draw(st.sampled_from(["separate", "shared", "factored"])), "bias": data.draw(st.booleans())}
    options |= {"from_logits": data.draw(st.booleans()), "shared_second_layer": data.draw(st.booleans())}
    rule = {
        "rule": data.draw(st.sampled_from(["clamp", "softmax", "l1"])),
        "gamma": data.draw(st.sampled_from([0.3, 0.7, 1.0])),
    }
    rule["projected_gradient"] = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(DTYPES))
    problem = make_problem(**options, dtype=dtype, seed=data.draw(st.integers(0, 2**31)))
    problem = problem.map(data.draw(st.sampled_from([lambda x: x, _every_other, _by_columns])))
    exact = problem.map(Tensor.double).requires_grad()
    expected = reference_scores(exact, **rule)
    given = problem.requires_grad()
    scores = ops.alpha_head(*given.tensors(), **rule)
    assert scores.dtype == dtype and scores.shape == expected.shape
    assert_close(scores, expected, dtype, "scores", factor=4)
    if dtype not in (torch.float32, torch.float64) or rule["rule"] == "clamp":
        return "scores equal"  # at the ends of the interval a rounded value has another gradient
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (scores * weights.to(dtype)).sum().backward()
    for name, tensor in exact.floating().items():
        if tensor.grad is not None:
            assert_close(getattr(given, name).grad, tensor.grad, dtype, f"gradient of {name}", factor=20)
    return "scores and gradients equal"


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

    checked = ("zip.pth", "arrays.npz", "new.pth.undo.npz")

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
}
_READERS: dict[str, Callable[[Path], None]] = {
    "write_repaired": _check_repaired,
    "save_linear": lambda folder: _check_linear(folder, "linear.pth"),
    "save_linear, safetensors": lambda folder: _check_linear(folder, "l.safetensors"),
    "write_json": _check_json,
    "write_list": lambda folder: _check_list(folder),
}


def _check_list(folder: Path) -> None:
    images = read_list(folder / "list.txt", folder)
    assert len(images) == 2000 and len(set(images.labels.tolist())) == 1 and len({path[0] for path in images.paths}) == 1
