"""Tensors between the CPU and a GPU."""

import torch

from alphaext.utils.transfers import on_host, to_device


def test_tensors_arrive_with_their_values(device):
    there = torch.device(device)
    given = [torch.arange(6.0).view(2, 3), torch.tensor(7), torch.empty(0, dtype=torch.int64)]
    sent = [to_device(tensor, there) for tensor in given]
    assert all(tensor.device.type == there.type for tensor in sent)
    back = on_host(sent)
    assert all(tensor.is_cpu for tensor in back)
    assert all(one.equal(two) and one.dtype == two.dtype for one, two in zip(given, back, strict=True))


def test_nothing_is_nothing():
    assert on_host([]) == []
