"""Memory of large results: whose it is, and what becomes of it."""

import gc

import pytest
import torch

from fastsae.backends import native, recycled

pytestmark = pytest.mark.skipif(native.cpu is None, reason="no native code: FASTSAE_NO_NATIVE is set")

LARGE = (recycled.LEAST_BYTES // 4 // 64 + 3, 64)


def test_a_block_comes_back_when_its_last_view_is_gone():
    first = recycled.empty(LARGE, torch.float32)
    address, view = first.data_ptr(), first.T[1:]
    del first
    second = recycled.empty(LARGE, torch.float32)
    assert second.data_ptr() != address
    del view
    third = recycled.empty(LARGE, torch.float32)
    assert third.data_ptr() == address


def test_blocks_in_use_are_apart():
    tensors = [recycled.empty(LARGE, torch.float32).fill_(i) for i in range(5)]
    assert len({t.data_ptr() for t in tensors}) == 5
    assert all((t == i).all() for i, t in enumerate(tensors))


def test_two_blocks_are_kept():
    tensors = [recycled.empty(LARGE, torch.float32) for _ in range(4)]
    addresses = [t.data_ptr() for t in tensors]
    while tensors:
        del tensors[0]
    again = [recycled.empty(LARGE, torch.float32) for _ in range(2)]
    assert {t.data_ptr() for t in again} == set(addresses[2:])


def test_another_size_gets_other_memory():
    small = recycled.empty(LARGE, torch.float32)
    del small
    large = recycled.empty((4 * LARGE[0], 64), torch.float32).fill_(1)
    assert large.sum().item() == large.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (37, 199), LARGE, (2, *LARGE)])
def test_is_a_tensor_as_any_other(shape, dtype):
    tensor = recycled.empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert not tensor.requires_grad
    tensor.fill_(2)
    assert torch.equal(tensor.clone(), torch.full(shape, 2, dtype=dtype))


def test_no_memory_is_an_error():
    with pytest.raises(MemoryError):
        recycled.empty((1 << 50,), torch.float32)


def test_a_gradient_keeps_its_memory():
    """What autograd holds is not handed out a second time."""
    W = torch.nn.Parameter(torch.zeros(LARGE))

    class Ones(torch.autograd.Function):
        @staticmethod
        def forward(ctx, W):
            return W.sum()

        @staticmethod
        def backward(ctx, g):
            return recycled.empty(LARGE, torch.float32).fill_(1)

    Ones.apply(W).backward()
    gc.collect()
    recycled.empty(LARGE, torch.float32).fill_(7)
    assert (W.grad == 1).all()
