"""Micro-batched loss and gradients equal those of the whole batch."""

import threading
import time

import pytest
import torch

from minigpt.kernels import microbatch
from minigpt.kernels.cpu import CPU
from minigpt.kernels.microbatch import microbatched_loss
from minigpt.model import GPT, IGNORE_INDEX, GPTConfig
from tests.kernels.test_cpu import apart


@pytest.fixture
def model(monkeypatch) -> GPT:
    monkeypatch.setattr(microbatch, "TOKENS", 40)  # two windows
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 20, d_model=32, n_layers=2, n_heads=2, d_ff=64)).use(CPU)


def windows(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (batch, 21), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:].clone()


def loss_and_gradients(model, loss, batch, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nats = loss(*batch)
    (3 * nats).backward()
    return nats.detach(), [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize(("autocast", "close"), [(False, 1e-5), (True, 1e-2)])
@pytest.mark.parametrize(("n_threads", "batch"), [(1, 1), (1, 7), (2, 1), (2, 7), (3, 8)])
def test_loss_and_gradients_are_those_of_the_whole_batch(model, n_threads, batch, autocast, close):
    data = windows(batch)
    nats, gradients = loss_and_gradients(model, model.loss, data)
    result, result_gradients = loss_and_gradients(
        model, microbatched_loss(model, n_threads), data, autocast
    )
    assert result.dtype == torch.float32
    assert float(result) == pytest.approx(float(nats), rel=1e-3 if autocast else 1e-6)
    for fast, plain in zip(result_gradients, gradients, strict=True):
        assert apart(fast, plain) < close


def test_padding_does_not_count_in_any_micro_batch(model):
    ids, targets = windows(8)
    targets[:2] = IGNORE_INDEX  # a micro-batch of padding alone
    targets[5, 3:] = IGNORE_INDEX
    nats, gradients = loss_and_gradients(model, model.loss, (ids, targets))
    result, result_gradients = loss_and_gradients(
        model, microbatched_loss(model, 2), (ids, targets)
    )
    assert float(result) == pytest.approx(float(nats), rel=1e-6)
    for fast, plain in zip(result_gradients, gradients, strict=True):
        assert apart(fast, plain) < 1e-5
    with torch.no_grad():
        assert microbatched_loss(model, 2)(ids, torch.full_like(targets, IGNORE_INDEX)).isnan()


def test_gradients_do_not_depend_on_the_order_of_threads(model):
    plain, data = model.loss, windows(9)
    first = loss_and_gradients(model, microbatched_loss(model, 3), data, autocast=True)

    def late(ids, targets):  # the first part is the last one to be done
        time.sleep(0.2 * torch.equal(ids[0], data[0][0]))
        return plain(ids, targets)

    model.loss = late
    second = loss_and_gradients(model, microbatched_loss(model, 3), data, autocast=True)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_frozen_weights_get_no_gradient(model):
    model.embedding.weight.requires_grad_(False)
    microbatched_loss(model, 2)(*windows(4)).backward()
    assert model.embedding.weight.grad is None
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_microbatched_loss_works_without_gradients(model, mode):
    with mode():
        result, expected = (loss(*windows(5)) for loss in (microbatched_loss(model, 2), model.loss))
    assert not result.requires_grad
    assert float(result) == pytest.approx(float(expected), rel=1e-6)


def test_an_error_in_a_thread_is_raised(model):
    ids, targets = windows(4)
    with pytest.raises(IndexError, match="range"):
        microbatched_loss(model, 2)(ids + 50, targets)


def threads_of_a_new_thread() -> int:
    counts = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return counts[0]


def test_pool_threads_use_one_thread_each_and_others_are_unchanged():
    before = torch.get_num_threads()
    microbatch.thread_pool.cache_clear()
    try:
        torch.set_num_threads(3)
        pool = microbatch.thread_pool(2)
        alone = [pool.submit(torch.get_num_threads).result() for _ in range(4)]
        assert (alone, torch.get_num_threads(), threads_of_a_new_thread()) == ([1] * 4, 3, 3)
    finally:
        torch.set_num_threads(before)
        microbatch.thread_pool.cache_clear()


def test_number_of_threads_is_read_at_each_step(model, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        microbatch, "thread_pool", lambda n: sizes.append(n) or microbatch.ThreadPoolExecutor(n)
    )
    loss = microbatched_loss(model)  # before Lightning has shared the threads out
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    loss(*windows(4))
    assert sizes == [3]
    loss(*windows(2))  # fewer windows than threads
    assert sizes == [3]


def test_model_with_dropout_keeps_its_own_loss():
    model = GPT(GPTConfig(50, 20, d_model=32, n_layers=2, n_heads=2, d_ff=64, dropout=0.1))
    assert microbatched_loss(model, 2) == model.loss


def test_unused_weights_of_a_subclass_get_zero_gradients():
    class Idle(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.idle = torch.nn.Parameter(torch.ones(3))

        def forward(self, ids, cache=None):
            return super().forward(ids, cache).flip(-1)

    torch.manual_seed(0)
    model = Idle(GPTConfig(50, 20, d_model=32, n_layers=1, n_heads=2, d_ff=64)).use(CPU)
    data = windows(5)
    expected = model.loss(*data)
    expected.backward()
    expected = expected.detach()
    gradient = model.embedding.weight.grad.clone()
    result, (*_,) = loss_and_gradients(model, microbatched_loss(model, 2), data)
    assert float(result) == pytest.approx(float(expected), rel=1e-6)
    assert apart(model.embedding.weight.grad / 3, gradient) < 1e-5
    assert not model.idle.grad.any()
