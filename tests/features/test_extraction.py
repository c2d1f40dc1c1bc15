"""Extraction: the same bits whoever does it and however often it is interrupted, and never a folder that only looks whole."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import WIDTH, RandomTransform, TinyImages, TinyModel, TinyTransform, loaded, tiny_model

from alphaext.data import read_list
from alphaext.data.images import ImageReadError
from alphaext.data.loading import Reader, image_seed
from alphaext.features import extraction_folder, shards
from alphaext.features.extraction import extract
from alphaext.features.extraction_folder import ExtractionFolder
from alphaext.features.store import read_features
from alphaext.models.inference import for_cpu
from alphaext.utils import files as _files
from alphaext.utils.files import folder_lock

FORK = multiprocessing.get_context("fork")
COMPLETE = [".lock", "features.json", "features.npy", "labels.npy", "sums.npy"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of two batches of four images; and no waiting for the disk."""
    monkeypatch.setattr(shards, "IMAGES_PER_SHARD", 8)
    monkeypatch.setattr(_files.os, "fsync", lambda descriptor: None)


def never(*arguments):
    """In the place of joining: a kill before it."""
    raise KeyboardInterrupt


def until_joined(folder, images=None, **options):
    """An extraction that is interrupted when all shards are there."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ExtractionFolder, "join", never)
        run(folder, images, **options)


def run(folder, images=None, *, model=None, transform=None, batch_size=4, **options):
    """The extraction that most tests make."""
    images = TinyImages(30) if images is None else images
    transform = TinyTransform() if transform is None else transform
    model = tiny_model() if model is None else model
    return extract(model, images, folder, transform=transform, batch_size=batch_size, device="cpu", **options)


def direct(images, *, model=None, transform=None, batch_size=4, dtype="float16", passes=1, seed=0, left_out=()):
    """The same features by a plain loop."""
    model, transform = model or tiny_model(), transform or TinyTransform()
    model, _ = for_cpu(model, torch.zeros(2, 1, 6, 6))
    rows = []
    for number in range(passes):
        for start in range(0, len(images), batch_size):
            indices = [i for i in range(start, min(start + batch_size, len(images))) if i not in left_out]
            pictures = [super(TinyImages, images).load(i) for i in indices]
            if not pictures:
                continue
            if transform.random:
                seeds = [image_seed(seed, number, i) for i in indices]
                tensors = [transform.seeded(picture, s) for picture, s in zip(pictures, seeds, strict=True)]
            else:
                tensors = [transform(picture) for picture in pictures]
            rows.append(model.features(torch.stack(tensors)).numpy().astype(dtype))
    kept = [i for i in range(len(images)) if i not in left_out]
    return np.concatenate(rows), images.labels[kept].repeat(passes)


def check_equal(features, expected):
    rows, labels = expected
    assert features.features.dtype == rows.dtype and np.array_equal(features.features, rows)
    assert torch.equal(features.labels, labels)


def in_child(work, *arguments):
    """Start ``work`` in a forked process, the leader of a session of its own."""

    def body():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        work(*arguments)

    child = FORK.Process(target=body)
    child.start()
    return child


def wait_until(happened, seconds=20.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def parts(folder):
    return sorted(path.name for path in (folder / "parts").glob("*.npz"))


def session(leader):
    """The living processes of a session."""
    living = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[3]) == leader:
                living.append(int(entry.name))
    return living


# What comes out


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_is_already_done_the_result_is_that_of_a_plain_loop(tmp_path_factory, data):
    count = data.draw(st.integers(1, 40), "images")
    batch_size = data.draw(st.integers(1, 12), "batch size")
    passes = data.draw(st.sampled_from([1, 1, 2, 3]), "passes")
    dtype = data.draw(st.sampled_from(["float16", "float32"]), "dtype")
    left_out = data.draw(st.sets(st.integers(0, count - 1), max_size=min(3, count - 1)), "unreadable")
    transform = RandomTransform() if passes > 1 or data.draw(st.booleans(), "random") else TinyTransform()
    options = {"transform": transform, "batch_size": batch_size, "passes": passes, "dtype": dtype, "seed": 3}
    folder = tmp_path_factory.mktemp("any")
    log = folder / "log"
    images = TinyImages(count, log, unreadable=tuple(left_out))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(shards, "IMAGES_PER_SHARD", data.draw(st.integers(1, 20), "images a shard"))
        until_joined(folder / "f", images, skip_unreadable=True, **options)
        plan = shards.ShardPlan.of(count, passes, batch_size)
        numbers = st.integers(0, len(plan) - 1)
        gone, damaged = data.draw(st.sets(numbers), "gone"), data.draw(st.sets(numbers), "damaged")
        for number in gone:
            shards.shard_path(folder / "f", number).unlink()
        for number in damaged - gone:
            content = shards.shard_path(folder / "f", number).read_bytes()
            cut = len(content) * data.draw(st.integers(0, 99), "percent left") // 100
            shards.shard_path(folder / "f", number).write_bytes(content[:cut])
        log.unlink()
        features = run(folder / "f", images, skip_unreadable=True, **options)
    again = [i for number in sorted(gone | damaged) for i in plan.place(number).images]
    assert loaded(log) == again
    check_equal(features, direct(images, left_out=left_out, **options))
    assert [image["index"] for image in features.metadata["skipped"]] == sorted(left_out)
    assert sorted(os.listdir(folder / "f")) == COMPLETE


def test_the_sidecar_says_what_the_features_are(tmp_path):
    images, model = TinyImages(30), tiny_model()
    features = run(tmp_path / "f", images, model=model)
    about = features.metadata
    assert about["complete"] is True and (about["rows"], about["width"], about["dtype"]) == (30, WIDTH, "float16")
    assert about["model"] == model.fingerprint() and about["images"] == images.fingerprint()
    assert about["transform"] == {"name": "tiny", "scale": 1.0, "sizes": [6, 6]}
    assert (about["num_images"], about["passes"], about["seed"], about["batch_size"]) == (30, 1, None, 4)
    assert (about["num_classes"], about["class_names"], about["skipped"]) == (5, None, [])
    assert set(about["versions"]) == {"alphaext", "torch", "torchvision", "numpy", "python"}
    assert about["device"].startswith("CPU") and about["seconds"] >= 0
    features.verify()
    read_features(tmp_path / "f", model=model, images=images, transform=TinyTransform())


def test_a_random_transform_draws_from_seed_pass_and_index_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = run(tmp_path / "a", transform=RandomTransform(), passes=2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.metadata["seed"] == 1 and first.passes == 2 and first.class_counts().tolist() == [6] * 5
    assert not np.array_equal(first.features[:30], first.features[30:])
    other = run(tmp_path / "b", transform=RandomTransform(), passes=2, seed=2)
    assert not np.array_equal(first.features, other.features)
    one = run(tmp_path / "c", transform=RandomTransform(), seed=1)
    assert np.array_equal(one.features, first.features[:30])
    assert len({image_seed(s, p, i) for s in range(3) for p in range(3) for i in range(100)}) == 900


@pytest.mark.parametrize("transform", [TinyTransform(), RandomTransform()])
def test_workers_change_no_bit(tmp_path, transform):
    images = TinyImages(30)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    features = run(tmp_path / "f", images, transform=transform, workers=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    check_equal(features, direct(images, transform=transform))


def test_what_workers_need_can_be_sent_to_them():
    """As spawned workers have it, which know nothing of this process."""
    images = TinyImages(10, unreadable=(2,))
    reader = pickle.loads(pickle.dumps(Reader(images, RandomTransform())))
    batch = pickle.loads(pickle.dumps(reader[[(i, image_seed(3, 1, i)) for i in (1, 2, 3)]]))
    expected = [RandomTransform().seeded(super(TinyImages, images).load(i), image_seed(3, 1, i)) for i in (1, 3)]
    assert torch.equal(batch.images, torch.stack(expected)) and batch.indices == (1, 3)
    assert [(index, error.name) for index, error in batch.unreadable] == [(2, "tiny.npz[2]")]


def test_the_model_stays_as_it_was(tmp_path):
    model = tiny_model()
    model.model.train()
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with torch.autocast("cpu"):
        features = run(tmp_path / "f", model=model)
    check_equal(features, direct(TinyImages(30)))
    assert model.model.training and all(torch.equal(model.model.state_dict()[name], state[name]) for name in state)
    assert flags == (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)


def test_a_model_in_double_precision(tmp_path):
    model = tiny_model()
    model.model.double()
    rows = np.array(run(tmp_path / "f", model=model, dtype="float32").features)
    np.testing.assert_allclose(rows, direct(TinyImages(30), dtype="float32")[0], rtol=1e-5, atol=1e-6)


def test_a_default_device_of_the_user_is_no_trouble(tmp_path):
    images, model = TinyImages(10), tiny_model()
    expected = direct(images)
    with torch.device("meta"):
        features = run(tmp_path / "f", images, model=model, workers=1)
    check_equal(features, expected)


@pytest.mark.gpu(real=True)
def test_on_a_gpu(tmp_path):
    model, images = tiny_model(), TinyImages(30)
    found = [
        extract(
            model, images, tmp_path / str(workers), transform=TinyTransform(), batch_size=4, workers=workers, dtype="float32"
        )
        for workers in (0, 2)
    ]
    assert model.device.type == "cpu" and found[0].metadata["device"] == torch.cuda.get_device_name()
    assert np.array_equal(found[0].features, found[1].features)
    np.testing.assert_allclose(found[0].features, direct(images, dtype="float32")[0], rtol=1e-2, atol=1e-2)  # TF32 on the GPU


# Interruptions


def test_a_kill_in_the_middle_loses_no_image_and_repeats_none(tmp_path):
    folder, log = tmp_path / "f", tmp_path / "log"
    child = in_child(run, folder, TinyImages(60, log, seconds=0.01))
    wait_until(lambda: len(parts(folder)) >= 2)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (folder / "features.json").exists()
    kept, plan = parts(folder), shards.ShardPlan.of(60, 1, 4)
    (folder / "parts" / ".000007.npz.1.1.tmp").write_bytes(b"half")
    (folder / ".features.npy.1.1.tmp").write_bytes(b"half")
    done = sum(len(plan.place(int(name[:6])).images) for name in kept)
    with pytest.raises(ValueError, match=f"is not finished: {done} of 60 images are done; run the same extraction again"):
        read_features(folder)
    log.unlink()
    check_equal(run(folder, TinyImages(60, log)), direct(TinyImages(60)))
    assert loaded(log) == list(range(done, 60))
    assert sorted(os.listdir(folder)) == COMPLETE


def test_after_a_kill_the_workers_do_not_hold_the_folder(tmp_path):
    folder, log = tmp_path / "f", tmp_path / "log"
    child = in_child(lambda: run(folder, TinyImages(400, log, seconds=0.01), workers=2))
    wait_until(lambda: len(parts(folder)) >= 1)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    # The workers only look every few seconds whether their parent lives.
    check_equal(run(folder, TinyImages(400)), direct(TinyImages(400)))
    for pid in session(child.pid):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_keeps_the_shards_and_leaves_no_process(tmp_path, workers):
    folder, said = tmp_path / "f", tmp_path / "said"

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run(folder, TinyImages(400, seconds=0.01), workers=workers)
        except KeyboardInterrupt:
            said.write_text(f"{len(session(os.getpid())) - 1} processes beside this one")

    child = in_child(work)
    wait_until(lambda: len(parts(folder)) >= 2)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    child.join(20)
    assert child.exitcode == 0 and said.read_text() == "0 processes beside this one"
    assert len(parts(folder)) >= 2 and not (folder / "features.json").exists()
    wait_until(lambda: not session(child.pid))
    check_equal(run(folder, TinyImages(400)), direct(TinyImages(400)))


def test_an_error_stops_the_workers_though_its_traceback_is_kept(tmp_path):
    with pytest.raises(ImageReadError) as error:
        run(tmp_path / "f", TinyImages(200, unreadable=(20,)), workers=2)
    assert error.traceback and multiprocessing.active_children() == []


@pytest.mark.parametrize("failing", range(1, 8))
def test_a_full_disk_is_an_error_and_nothing_looks_whole(tmp_path, monkeypatch, failing):
    images, calls = TinyImages(24), []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    # One each for the note, three shards, features, labels and sidecar.
    monkeypatch.setattr(_files.os, "fsync", fsync)
    with pytest.raises(OSError) as error:
        run(tmp_path / "f", images)
    assert error.value.errno == errno.ENOSPC
    assert Path(error.value.filename).is_relative_to(tmp_path / "f")
    with pytest.raises(ValueError):
        read_features(tmp_path / "f")
    check_equal(run(tmp_path / "f", images), direct(images))


def test_too_little_room_is_refused_at_the_start(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(extraction_folder.shutil, "disk_usage", lambda path: usage._replace(free=3_210_000))
    log = tmp_path / "log"
    with pytest.raises(OSError, match=r"16\.8 MB of disk are needed .* 30 images .*, and 3\.2 MB are free: make room") as error:
        run(tmp_path / "f", TinyImages(30, log))
    assert error.value.errno == errno.ENOSPC and loaded(log) == []


def test_a_lost_shard_is_named(tmp_path, monkeypatch):
    real = ExtractionFolder.join

    def join(self, *arguments):
        (self.path / "parts" / "000001.npz").write_bytes(b"damaged")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ExtractionFolder, "join", join)
        with pytest.raises(ValueError, match="000001.npz is damaged.*run the same extraction again"):
            run(tmp_path / "f")
    check_equal(run(tmp_path / "f"), direct(TinyImages(30)))


def test_shards_of_another_extraction_do_not_count(tmp_path):
    for name, model in (("a", tiny_model()), ("b", tiny_model(seed=1))):
        until_joined(tmp_path / name, model=model)
    shutil.copy(tmp_path / "b" / "parts" / "000001.npz", tmp_path / "a" / "parts" / "000001.npz")
    shutil.copy(tmp_path / "a" / "parts" / "000002.npz", tmp_path / "a" / "parts" / "000000.npz")
    with pytest.raises(ValueError, match="is not finished"):
        read_features(tmp_path / "a")
    check_equal(run(tmp_path / "a"), direct(TinyImages(30)))


def test_a_shard_of_another_pass_does_not_count(tmp_path):
    until_joined(tmp_path / "f", transform=RandomTransform(), passes=2)
    shutil.copy(shards.shard_path(tmp_path / "f", 1), shards.shard_path(tmp_path / "f", 5))
    features = run(tmp_path / "f", transform=RandomTransform(), passes=2)
    check_equal(features, direct(TinyImages(30), transform=RandomTransform(), passes=2))


# What a folder may hold


def test_a_complete_folder_is_used_again(tmp_path):
    log, images = tmp_path / "log", TinyImages(30, tmp_path / "log")
    first = run(tmp_path / "f", images)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "f").iterdir()}
    log.unlink()
    again = run(tmp_path / "f", images, seed=9)  # nothing is drawn, so the seed does not count
    check_equal(again, (first.features, first.labels))
    assert loaded(log) == []
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "f").iterdir()} == before


def test_what_a_kill_in_the_last_moment_left_is_removed(tmp_path):
    run(tmp_path / "f")
    (tmp_path / "f" / "parts").mkdir()
    (tmp_path / "f" / "parts" / "000000.npz").write_bytes(b"")
    run(tmp_path / "f")
    assert sorted(os.listdir(tmp_path / "f")) == COMPLETE


OTHERS = [
    ({"model": tiny_model(seed=1)}, "model is"),
    ({"images": TinyImages(29)}, "images is"),
    ({"transform": TinyTransform(2.0)}, "transform.scale is 2.0 here and 1.0 there"),
    ({"transform": RandomTransform()}, "seed is 0 here and None there"),
    ({"dtype": "float32"}, "dtype is 'float32' here and 'float16' there"),
    ({"batch_size": 5}, "batch_size is 5 here and 4 there"),
    ({"model": tiny_model(num_classes=6)}, "num_classes is 6 here and 5 there"),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS)
@pytest.mark.parametrize("complete", [True, False])
def test_another_extraction_in_the_folder_is_refused_and_untouched(tmp_path, changes, message, complete):
    (run if complete else until_joined)(tmp_path / "f")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "f").rglob("*")}
    with pytest.raises(ValueError) as error:
        run(tmp_path / "f", **changes)
    assert message in str(error.value) and "Choose another folder, or remove this one" in str(error.value)
    assert ("holds other features" if complete else "has begun another extraction") in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "f").rglob("*")} == before


def test_the_classifier_does_not_count(tmp_path):
    run(tmp_path / "f")
    model = tiny_model()
    torch.nn.init.zeros_(model.classifier.weight)
    run(tmp_path / "f", model=model)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be new, empty or an extraction's, but .* there is 'holiday.jpg'"):
        run(tmp_path / "f")
    assert os.listdir(tmp_path / "f") == ["holiday.jpg"]
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        run(tmp_path / "f" / "holiday.jpg")


def test_two_at_once_do_not_mix(tmp_path):
    folder = tmp_path / "f"
    child = in_child(run, folder, TinyImages(400, seconds=0.01))
    wait_until(lambda: len(parts(folder)) >= 1)
    try:
        with pytest.raises(ValueError, match="another process is writing features into"):
            run(folder, TinyImages(400))
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    with folder_lock(folder, "features"), pytest.raises(ValueError, match="another process"):
        run(folder, TinyImages(400))
    run(folder, TinyImages(400))


# Images and features that are no good


@pytest.fixture
def pictures(tmp_path):
    """Twenty JPEG files in a list; the one named 13.jpg is truncated."""
    from PIL import Image

    generator = np.random.default_rng(0)
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(20):
        Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(root / f"{number}.jpg")
    whole = (root / "13.jpg").read_bytes()
    (root / "13.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg {number % 5}\n" for number in range(20)))
    return read_list(tmp_path / "list.txt", root), whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_stops_it_by_name_and_after_repair_it_goes_on(tmp_path, pictures, workers):
    images, whole = pictures
    with pytest.raises(ImageReadError, match="cannot read image '13.jpg'") as error:
        run(tmp_path / "f", images, workers=workers)
    assert error.value.name == "13.jpg" and "Traceback" not in str(error.value)
    assert parts(tmp_path / "f") == ["000000.npz"]
    (images.root / "13.jpg").write_bytes(whole)
    features = run(tmp_path / "f", images)
    assert len(features) == 20 and features.metadata["skipped"] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_left_out_when_asked(tmp_path, pictures, workers):
    images, whole = pictures
    with pytest.warns(UserWarning, match="1 of 20 images cannot be read and are left out: '13.jpg'"):
        features = run(tmp_path / "f", images, workers=workers, skip_unreadable=True)
    assert len(features) == 19 and features.labels.tolist() == [i % 5 for i in range(20) if i != 13]
    (skipped,) = features.metadata["skipped"]
    assert (skipped["index"], skipped["name"]) == (13, "13.jpg") and skipped["reason"]
    # The others are what they are without it.
    (images.root / "13.jpg").write_bytes(whole)
    repaired = run(tmp_path / "g", images)
    others = [i for i in range(20) if i != 13]
    assert np.array_equal(features.features[:12], repaired.features[:12])
    np.testing.assert_allclose(features.features, repaired.features[others], rtol=2e-3, atol=1e-6)


def test_features_with_gaps_are_only_for_who_asks_for_them(tmp_path):
    images = TinyImages(30, tmp_path / "log", unreadable=(9,))
    with pytest.warns(UserWarning, match="left out"):
        run(tmp_path / "f", images, skip_unreadable=True)
    with pytest.raises(ValueError, match=r"without 1 images .* such as 'tiny.npz\[9\]'; set skip_unreadable=True"):
        run(tmp_path / "f", images)
    with pytest.warns(UserWarning, match="left out"):
        run(tmp_path / "f", images, skip_unreadable=True)


def test_shards_with_gaps_are_made_anew_without_skip_unreadable(tmp_path):
    until_joined(tmp_path / "f", TinyImages(30, unreadable=(9,)), skip_unreadable=True)
    images = TinyImages(30, tmp_path / "log")
    check_equal(run(tmp_path / "f", images), direct(images))
    assert loaded(tmp_path / "log") == list(range(8, 16))


def test_how_far_several_passes_are(tmp_path):
    until_joined(tmp_path / "f", transform=RandomTransform(), passes=2)
    shards.shard_path(tmp_path / "f", 7).unlink()
    with pytest.raises(ValueError, match=r"is not finished: 54 of 60 images \(of 2 passes\) are done"):
        read_features(tmp_path / "f")


def test_with_real_transforms_and_a_real_network(tmp_path, pictures):
    pytest.importorskip("torchvision")
    from alphaext.data.transforms import small_test_transform, small_train_transform
    from alphaext.models.zoo import make_model, split_model

    images, whole = pictures
    (images.root / "13.jpg").write_bytes(whole)
    model = split_model(make_model("small", 5), example=torch.rand(2, 3, 8, 8))
    random = small_train_transform(8)
    found = [run(tmp_path / f"random{w}", images, model=model, transform=random, passes=2, workers=w) for w in (0, 2)]
    assert np.array_equal(found[0].features, found[1].features)
    plain = run(tmp_path / "plain", images, model=model, transform=small_test_transform(8), dtype="float32")
    pictures = torch.stack([small_test_transform(8)(images.load(i)) for i in range(4)])
    np.testing.assert_allclose(plain.features[:4], model.features(pictures).numpy(), rtol=1e-4, atol=1e-6)
    read_features(tmp_path / "plain", model=model, images=images, transform=small_test_transform(8))


def test_an_image_unreadable_in_one_pass_is_left_out_of_all(tmp_path):
    class Flaky(TinyImages):
        times = 0

        def load(self, index):
            if index == 9:
                self.times += 1
                self.unreadable = (9,) if self.times == 2 else ()
            return super().load(index)

    with pytest.warns(UserWarning, match="1 of 30"):
        features = run(tmp_path / "f", Flaky(30), transform=RandomTransform(), passes=3, skip_unreadable=True)
    assert len(features) == 87 and features.class_counts().tolist() == [6, 6, 6, 6, 5]
    whole = run(tmp_path / "g", transform=RandomTransform(), passes=3).features.reshape(3, 30, WIDTH)
    assert np.array_equal(features.features.reshape(3, 29, WIDTH)[0], np.delete(whole[0], 9, axis=0))


def test_no_readable_image_at_all(tmp_path):
    with pytest.raises(
        ValueError, match=r"none of the 3 images can be read; the first, 'tiny.npz\[0\]': image file is truncated"
    ):
        run(tmp_path / "f", TinyImages(3, unreadable=(0, 1, 2)), skip_unreadable=True)


def scaled(factor):
    model = tiny_model()
    with torch.no_grad():
        model.model.convolution.weight *= factor
    return model


def test_features_too_large_for_float16(tmp_path):
    message = r"features of image 'tiny.npz\[\d+\]' are too large for float16: \d.* ends at 65504; use dtype=\"float32\""
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "f", model=scaled(2e5))
    features = run(tmp_path / "g", model=scaled(2e5), dtype="float32")
    assert 65504 < float(features.features.max()) < np.inf


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(tmp_path, dtype, value):
    class Bad(TinyTransform):
        def __call__(self, image):
            tensor = super().__call__(image)
            if np.array_equal(np.array(image), TinyImages(30).pixels[17]):
                tensor[0, 5, 5] = value
            return tensor

    with pytest.raises(ValueError, match=r"features of image 'tiny.npz\[17\]' must be finite, got (nan|inf) in column \d+"):
        run(tmp_path / "f", transform=Bad(), dtype=dtype)
    assert parts(tmp_path / "f") == ["000000.npz", "000001.npz"]


class Fails(TinyTransform):
    def __call__(self, image):
        raise RuntimeError("no such channel")


class Bare(TinyTransform):
    def __call__(self, image):
        return np.array(image)


class Whole(TinyTransform):
    def __call__(self, image):
        return torch.zeros(1, 6, 6, dtype=torch.uint8)


class Uneven(TinyTransform):
    def __call__(self, image):
        return torch.zeros(1, 6, 6 + int(np.array(image)[0, 0]) // 8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Fails(), r"the transform fails on image 'tiny.npz\[0\]': RuntimeError: no such channel"),
        (Bare(), r"the transform fails on image 'tiny.npz\[0\]': TypeError: it must return a tensor, got a ndarray"),
        (Whole(), "TypeError: it must return floating point, got torch.uint8"),
        (Uneven(), r"ValueError: it must give all images one shape, got \[1, 6, \d+\] and \[1, 6, \d+\]"),
    ],
)
def test_a_transform_that_does_not_work_is_told_with_the_image(tmp_path, workers, transform, message):
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "f", transform=transform, workers=workers)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": TinyModel()}, TypeError, r"must be SplitModel, got TinyModel; split_model\(model\) makes one"),
        ({"images": [1, 2]}, TypeError, "images must be LabelledImages, got list"),
        ({"images": TinyImages(0)}, ValueError, "images must not be empty"),
        ({"transform": lambda image: image}, TypeError, "transform must be an ImageTransform.*got function"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of float16, float32, got 'float64'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"workers": -1}, ValueError, "workers must be at least 0, got -1"),
        ({"passes": 0}, ValueError, "passes must be at least 1, got 0"),
        ({"passes": 2}, ValueError, "passes must be 1 with a transform that draws nothing, got 2"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        (
            {"model": tiny_model(num_classes=4)},
            ValueError,
            r"labels must be classes of the model, 0..3, got 4 for image 'tiny.npz\[4\]' \(6 of 30 images have such labels\)",
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, changes, kind, message):
    with pytest.raises(kind, match=message):
        run(tmp_path / "f", **changes)
    assert not (tmp_path / "f").exists()


def test_descriptions_that_json_cannot_hold_and_models_without_weights(tmp_path):
    transform, model = TinyTransform(), tiny_model()
    transform.description = {"name": object()}
    with pytest.raises(TypeError, match="transform.description must be what JSON can hold"):
        run(tmp_path / "f", transform=transform)
    model.model.to("meta")
    with pytest.raises(ValueError, match="must have weights"):
        run(tmp_path / "f", model=model)


def test_class_names_are_kept_where_they_name_the_model_s_classes(tmp_path):
    images = TinyImages(10)
    images.class_names = tuple("abcd\udce9")
    assert run(tmp_path / "f", images).class_names == (*"abcd", "\\udce9")
    with pytest.warns(UserWarning, match="names for 5 classes and the model has 7: the features are kept without names"):
        features = run(tmp_path / "g", images, model=tiny_model(num_classes=7))
    assert features.class_names is None and features.num_classes == 7


# Several processes


def together(tmp_path, works):
    """Run each of the works in a process of one group; returns what each said, and how long all took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def body(rank, work):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(works)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                features = work()
            result = (len(features), [str(warning.message) for warning in said if "left out" in str(warning.message)])
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
            if multiprocessing.active_children():
                result = f"workers still live after {result}"
        (tmp_path / f"said-{rank}").write_bytes(pickle.dumps(result))

    started = time.monotonic()
    children = [FORK.Process(target=body, args=place) for place in enumerate(works)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert not any(child.is_alive() for child in children)
    said = [pickle.loads((tmp_path / f"said-{rank}").read_bytes()) for rank in range(len(works))]
    return said, time.monotonic() - started


def test_two_processes_share_the_work_to_the_same_bits(tmp_path):
    """Started by torchrun; half of the shards are there already."""
    images, folder, log = TinyImages(60), tmp_path / "f", tmp_path / "log"
    until_joined(folder, images)
    for number in (1, 2, 5, 6, 7):
        shards.shard_path(folder, number).unlink()
    options = json.dumps({"count": 60, "folder": str(folder), "log": str(log)})
    program = Path(__file__).parents[1] / "helpers" / "tiny_images.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program), options]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["process 0 has 60 rows", "process 1 has 60 rows"]
    check_equal(read_features(folder), direct(images))
    assert sorted(os.listdir(folder)) == COMPLETE
    by_process = {}
    for line in log.read_text().splitlines():
        index, pid = line.split()
        by_process.setdefault(pid, []).append(int(index) // 8)
    assert sorted(sorted(set(numbers)) for numbers in by_process.values()) == [[1, 5, 7], [2, 6]]
    assert sorted(loaded(log)) == [i for number in (1, 2, 5, 6, 7) for i in shards.ShardPlan.of(60, 1, 4).place(number).images]


def test_three_processes_and_an_image_left_out(tmp_path):
    images = TinyImages(60, unreadable=(30,))
    said, _ = together(tmp_path, [lambda: run(tmp_path / "f", images, skip_unreadable=True)] * 3)
    warning = "1 of 60 images cannot be read and are left out: 'tiny.npz[30]'"
    assert said == [(59, [warning]), (59, []), (59, [])]
    check_equal(read_features(tmp_path / "f"), direct(images, left_out=(30,)))


def test_an_error_in_one_process_is_one_in_all_and_soon(tmp_path, monkeypatch):
    monkeypatch.setattr("alphaext.features.extraction._SECONDS_A_ROUND", 0.2)
    # The second process meets the image in its second shard, the first would go on for half a minute.
    images = TinyImages(4000, seconds=0.01, unreadable=(24,))
    works = [lambda workers=workers: run(tmp_path / "f", images, workers=workers) for workers in (2, 0)]
    said, seconds = together(tmp_path, works)
    error = "ImageReadError: cannot read image 'tiny.npz[24]': image file is truncated"
    assert said == [f"PeerError: process 1 of 2 failed: {error}", error] and seconds < 10
    assert "000001.npz" in parts(tmp_path / "f") and "000003.npz" not in parts(tmp_path / "f")


def test_an_error_of_the_first_process_is_one_in_all(tmp_path):
    run(tmp_path / "f", batch_size=5)
    said, _ = together(tmp_path, [lambda: run(tmp_path / "f")] * 2)
    assert said[0].startswith("ValueError") and "batch_size is 4 here and 5 there" in said[0]
    assert said[1].startswith("PeerError: process 0 of 2 failed: ValueError") and "batch_size is 4 here" in said[1]


def test_processes_with_other_models_or_folders_are_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction_folder, "_SECONDS_TO_APPEAR", 0.5)
    said, _ = together(tmp_path, [lambda seed=seed: run(tmp_path / "f", model=tiny_model(seed=seed)) for seed in (0, 1)])
    assert all("ValueError: all processes must extract the same" in text and "model is" in text for text in said)
    said, _ = together(tmp_path, [lambda rank=rank: run(tmp_path / f"g{rank}") for rank in (0, 1)])
    assert "FileNotFoundError" in said[1] and "must be on a file system that all processes share" in said[1]
    assert said[0].startswith("PeerError: process 1 of 2 failed: FileNotFoundError")


def test_a_process_that_is_killed_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("alphaext.features.extraction._SECONDS_A_ROUND", 0.2)

    class Deadly(TinyImages):
        def load(self, index):
            if index == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().load(index)

    (tmp_path / "said-1").write_bytes(pickle.dumps("killed"))
    images = Deadly(4000, seconds=0.01)
    said, seconds = together(tmp_path, [lambda: run(tmp_path / "f", images)] * 2)
    assert said[1] == "killed" and "Error" in said[0] and seconds < 15


# The progress bar


def test_the_progress_bar_counts_what_was_done_before(tmp_path, monkeypatch, capsys):
    run(tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    until_joined(tmp_path / "f")
    monkeypatch.setenv("COLUMNS", "120")
    shards.shard_path(tmp_path / "f", 2).unlink()
    with pytest.raises(ImageReadError):
        run(tmp_path / "f", TinyImages(30, unreadable=(20,)), progress=True)
    assert capsys.readouterr().err.startswith("extracting: 26 of 30 images")
    run(tmp_path / "f", progress=True)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("extracting: 30 of 30 images") and "images a second" in said.err


# Processes that compute


def one_thread(tmp_path, **options):
    """What a single thread of this process makes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return np.array(run(tmp_path / "here", dtype="float32", **options).features)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_processes_that_compute_change_no_bit(tmp_path, processes, workers):
    expected = one_thread(tmp_path)
    threads = torch.get_num_threads()
    features = run(tmp_path / "apart", dtype="float32", processes=processes, workers=workers)
    assert np.array_equal(features.features, expected)
    assert torch.get_num_threads() == threads and multiprocessing.active_children() == []
    assert "1 thread" in features.metadata["device"]


def test_processes_that_compute_go_on(tmp_path):
    until_joined(tmp_path / "f", dtype="float32", processes=2)
    for number in (1, 3):
        shards.shard_path(tmp_path / "f", number).unlink()
    log = tmp_path / "log"
    features = run(tmp_path / "f", TinyImages(30, log), dtype="float32", processes=3)
    # The first is read once more, to see what the network is to be prepared for.
    assert sorted(loaded(log)) == [8, *range(8, 16), *range(24, 30)]
    assert np.array_equal(features.features, one_thread(tmp_path))


def test_all_processes_compute(tmp_path):
    log = tmp_path / "log"
    run(tmp_path / "f", TinyImages(30, log, seconds=0.02), processes=2)
    by_process = [line.split()[1] for line in log.read_text().splitlines()]
    assert len(set(by_process)) == 3 and by_process.count(str(os.getpid())) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_ends_the_processes_that_compute(tmp_path, workers):
    log, images = tmp_path / "log", TinyImages(30, tmp_path / "log", seconds=0.1)
    child = in_child(lambda: run(tmp_path / "f", images, processes=2, workers=workers))
    wait_until(lambda: len(loaded(log)) > 4)
    os.killpg(child.pid, signal.SIGINT)
    child.join(10)
    assert child.exitcode not in (None, 0) and session(child.pid) == []


def test_a_kill_ends_the_processes_that_compute(tmp_path):
    log, images = tmp_path / "log", TinyImages(30, tmp_path / "log", seconds=0.1)
    child = in_child(lambda: run(tmp_path / "f", images, processes=2))
    wait_until(lambda: len(loaded(log)) > 4)
    os.kill(child.pid, signal.SIGKILL)
    child.join(10)
    wait_until(lambda: session(child.pid) == [])
    check_equal(run(tmp_path / "f"), direct(TinyImages(30)))


class Deadly(TinyTransform):
    """Kills the process that reads an image, as the system does where memory has run out."""

    def __call__(self, image):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(image)


def test_a_process_that_computes_and_is_killed_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"was killed \(exit code -9\).*take fewer processes"):
        run(tmp_path / "f", transform=Deadly(), processes=2)
    assert multiprocessing.active_children() == []


def test_errors_come_back_from_processes_that_compute(tmp_path):
    with pytest.raises(ImageReadError, match=r"tiny.npz\[9\]"):
        run(tmp_path / "f", TinyImages(30, unreadable=(9,)), processes=2)
    with pytest.raises(ValueError, match="cannot take images"):
        run(tmp_path / "g", transform=Wide(), processes=2)
    with pytest.warns(UserWarning, match="1 of 30 images cannot be read"):
        features = run(tmp_path / "f", TinyImages(30, unreadable=(9,)), processes=2, skip_unreadable=True)
    check_equal(features, direct(TinyImages(30), left_out=(9,)))
    with pytest.raises(ValueError, match="processes must be at least 0, got -1"):
        run(tmp_path / "h", processes=-1)


class Wide(TinyTransform):
    """Images with more channels than the model takes."""

    def __call__(self, image):
        return super().__call__(image).expand(2, 6, 6)


# How images are computed


def test_the_batch_size_is_that_of_the_folder_or_of_the_device(tmp_path):
    assert run(tmp_path / "default", batch_size=None).metadata["batch_size"] == 16
    assert run(tmp_path / "f", batch_size=4).metadata["batch_size"] == 4
    assert run(tmp_path / "f", batch_size=None).metadata["batch_size"] == 4
    until_joined(tmp_path / "begun", batch_size=5)
    assert run(tmp_path / "begun", batch_size=None).metadata["batch_size"] == 5


def test_bfloat16_is_nearly_the_same_and_never_taken_for_float32(tmp_path):
    plain = run(tmp_path / "plain", dtype="float32")
    narrow = run(tmp_path / "narrow", dtype="float32", precision="bfloat16")
    assert not np.array_equal(plain.features, narrow.features)
    np.testing.assert_allclose(narrow.features, plain.features, rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match="precision is 'float32' here and 'bfloat16' there"):
        run(tmp_path / "narrow", dtype="float32")
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'float16'"):
        run(tmp_path / "other", precision="float16")
