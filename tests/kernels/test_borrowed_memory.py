"""Memory that calls hand on: the same bytes again, never to two at once, given back when asked."""

import threading

import pytest
import torch

from compresskit.kernels.linear_kl import Head, linear_kl, products, release_memory
from compresskit.kernels.linear_kl.products import ALIGNMENT, borrowed, large_empty

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_rests():
    release_memory()
    yield
    release_memory()


@pytest.mark.parametrize("shape", [(1,), (7, 13), (1 << 20,), (3001, 777)])
def test_large_memory_begins_at_a_cache_line(shape):
    found = large_empty(*shape, dtype=torch.float32, device=CPU)
    assert found.shape == shape
    assert found.data_ptr() % ALIGNMENT == 0


def test_the_next_call_gets_the_same_memory():
    with borrowed(1000, CPU) as first:
        assert first.numel() >= 1000
    with borrowed(900, CPU) as second:
        assert second.data_ptr() == first.data_ptr()
    with borrowed(5000, CPU) as third:
        assert third.numel() >= 5000
    with borrowed(10, CPU) as fourth:
        assert fourth.data_ptr() == third.data_ptr()


def test_two_at_once_share_nothing_and_the_larger_stays():
    with borrowed(1000, CPU) as one, borrowed(4000, CPU) as other:
        assert one.data_ptr() != other.data_ptr()
    (kept,) = products._RESTING
    assert kept.data_ptr() == other.data_ptr()
    release_memory()
    assert not products._RESTING


def test_calls_in_threads_give_what_they_give_alone():
    head, teacher_head = Head(torch.randn(300, 8)), Head(torch.randn(300, 8))
    inputs = [(torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)) for _ in range(8)]

    def grad(number):
        hidden, teacher = inputs[number]
        loss = linear_kl(hidden, head, teacher, teacher_head, token_weight=torch.ones(16), impl="chunked")
        return torch.autograd.grad(loss, hidden)[0]

    alone, together = [grad(number) for number in range(8)], [None] * 8

    def work(number):
        for _ in range(20):
            together[number] = grad(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
