"""Groups of processes: what they tell each other, and how they end."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import pytest
import torch
from processes import free_port, run_processes, torchrun_environment

from alphaext.utils.processes import Group, PeerError, keep_freed_memory, process_group, processors_per_process


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in torchrun_environment(0, 1, 1):
        monkeypatch.delenv(name, raising=False)


def alone() -> Group:
    return Group(0, 1, 0, torch.device("cpu"))


def test_one_process_is_a_group_of_its_own():
    with process_group("cpu") as group:
        assert (group.rank, group.world_size, group.local_rank, group.is_main) == (0, 1, 0, True)
        assert group.device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
        group.barrier()
        tensor = torch.ones(2)
        total = group.sum(tensor)
        assert torch.equal(total, tensor) and total is not tensor
        group.broadcast([tensor])
        assert group.all_gather_object((1, "a")) == [[1, "a"]]
        assert group.broadcast_object({"a": None}) == {"a": None}
        assert list(group.share(3)) == [0, 1, 2]
        with group.together():
            pass


def test_torchrun_with_one_process_is_the_same(monkeypatch):
    for name, value in torchrun_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    with process_group("cpu") as group:
        assert group.world_size == 1 and not torch.distributed.is_initialized()


def test_together_passes_the_own_error_on():
    with pytest.raises(FileNotFoundError, match="gone"), alone().together():
        raise FileNotFoundError("gone")


def test_what_json_cannot_write_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        alone().all_gather_object(torch.ones(1))


def _talk():
    with process_group("cpu", timeout=30) as group:
        rank = group.rank
        group.barrier()
        tensors = [torch.full((2, 3), float(rank)), torch.tensor(rank), torch.full((2, 4), rank)[:, ::2]]
        kept = [tensor.clone() for tensor in tensors]
        sums = [group.sum(tensor).tolist() for tensor in tensors]
        unchanged = all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
        group.broadcast(tensors, source=1)
        return {
            "rank": rank,
            "main": group.is_main,
            "initialized": torch.distributed.is_initialized(),
            "sums": sums,
            "unchanged": unchanged,
            "sent": [tensor.tolist() for tensor in tensors],
            "gathered": group.all_gather_object({"text": "ä" * (1000 * rank), "rank": rank}),
            "object": group.broadcast_object(f"of {rank}", source=1),
            "share": list(group.share(5)),
        }


def test_what_processes_tell_each_other():
    results = run_processes(2, _talk)
    for rank, result in enumerate(results):
        assert result["rank"] == rank and result["main"] == (rank == 0) and result["initialized"] and result["unchanged"]
        assert result["sums"] == [[[1.0] * 3] * 2, 1, [[1, 1]] * 2]
        assert result["sent"] == [[[1.0] * 3] * 2, 1, [[1, 1]] * 2]
        assert result["gathered"] == [{"text": "", "rank": 0}, {"text": "ä" * 1000, "rank": 1}]
        assert result["object"] == "of 1"
    assert [result["share"] for result in results] == [[0, 2, 4], [1, 3]]


def _fail_together():
    with process_group("cpu", timeout=30) as group:
        try:
            with group.together():
                if group.rank == 1:
                    raise FileNotFoundError("no such image")
        except (FileNotFoundError, PeerError) as error:
            first = error
        with group.together():
            pass
        raise first


def test_an_error_in_one_process_is_one_in_all():
    first, second = run_processes(2, _fail_together)
    assert isinstance(second, FileNotFoundError) and str(second) == "no such image"
    assert isinstance(first, PeerError) and str(first) == "process 1 of 2 failed: FileNotFoundError: no such image"


def _fail_alone():
    started = time.monotonic()
    try:
        with process_group("cpu", timeout=300) as group:
            group.barrier()
            if group.rank == 1:
                raise ZeroDivisionError("on its own")
            group.barrier()
    except Exception as error:
        return type(error).__name__, time.monotonic() - started, torch.distributed.is_initialized()


def test_a_process_that_fails_ends_the_waiting_of_the_others():
    (name, waited, initialized), (own, _, own_initialized) = run_processes(2, _fail_alone, timeout=60)
    assert own == "ZeroDivisionError" and not own_initialized
    assert name != "ZeroDivisionError" and waited < 30 and not initialized


def _hang():
    try:
        with process_group("cpu", timeout=1) as group:
            if group.rank == 1:
                time.sleep(3)
                return None
            group.barrier()
    except Exception as error:
        return type(error).__name__


def test_a_process_that_hangs_is_waited_for_during_the_timeout_only():
    started = time.monotonic()
    first, _ = run_processes(2, _hang, timeout=60)
    assert first is not None
    assert time.monotonic() - started < 30


def _nested():
    torch.distributed.init_process_group("gloo")
    with process_group("cpu") as group, process_group("cpu") as inner:
        size = (group.world_size, inner.world_size)
    kept = torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()
    return size, kept


def test_a_group_that_is_there_is_taken_and_left():
    assert run_processes(2, _nested) == [((2, 2), True)] * 2


def test_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib\n"
        "from alphaext.utils.processes import process_group\n"
        "with process_group('cpu') as group:\n"
        "    import torch._dynamo  # as torchvision does\n"
        "    seen = group.all_gather_object(group.rank)\n"
        "    if group.is_main: print('seen', seen)\n"
        "threads = [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "assert not any('gloo' in name for name in threads), threads\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "seen [0, 1]" in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "missing: WORLD_SIZE, MASTER_ADDR, MASTER_PORT; unset RANK"),
        ({"WORLD_SIZE": "2"}, "missing: RANK, MASTER_ADDR, MASTER_PORT; unset WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "missing: MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "1"}, "missing: RANK; unset WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer, got 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK must be between 0 and 0, got 1"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK must be an integer"),
    ],
)
def test_an_environment_that_says_half(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), process_group("cpu"):
        pass


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:-2", 5.0])
def test_a_device_that_is_none(device):
    with pytest.raises(ValueError, match="device must be"), process_group(device):
        pass


def test_a_timeout_that_is_none():
    with pytest.raises(ValueError, match="timeout must be seconds above 0"), process_group("cpu", timeout=0):
        pass


def test_devices_of_several_processes(monkeypatch):
    from alphaext.utils.processes import _device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert _device(None, 1, 2) == _device("cuda", 1, 2) == _device("cuda:1", 1, 2) == torch.device("cuda:1")
    assert _device(None, 0, 1) == torch.device("cuda:0") and _device("cuda:1", 0, 1) == torch.device("cuda:1")
    assert _device("cpu", 1, 2) == torch.device("cpu")
    with pytest.raises(ValueError, match="each with a GPU of its own, got 'cuda:0' in the one of LOCAL_RANK=1"):
        _device("cuda:0", 1, 2)
    with pytest.raises(ValueError, match="one of 2 GPUs that torch sees, got 'cuda:2'"):
        _device("cuda", 2, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU"):
        _device("cuda", 0, 1)


def test_a_process_that_keeps_its_memory_gets_the_same_pages_again():
    def faults_of_a_second_block():
        keep_freed_memory()
        size = 64 * 2**20  # far above what the C library keeps by itself
        bytearray(size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(size)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    (faults,) = run_processes(1, faults_of_a_second_block)
    assert faults < 1000  # of 16,384 pages


def test_processors_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processors_per_process() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert processors_per_process() == 2
