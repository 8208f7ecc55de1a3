"""A batch in micro-batches, on several threads, gives what the net gives for the whole of it."""

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
def net(monkeypatch) -> GPT:
    monkeypatch.setattr(microbatch, "TOKENS", 40)  # two windows
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 20, d_model=32, n_layers=2, n_heads=2, d_ff=64)).use(CPU)


def windows(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (batch, 21), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:].clone()


def loss_and_gradients(net, loss, batch, autocast=False):
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nats = loss(*batch)
    (3 * nats).backward()
    return nats.detach(), [weight.grad.clone() for weight in net.parameters()]


@pytest.mark.parametrize(("autocast", "close"), [(False, 1e-5), (True, 1e-2)])
@pytest.mark.parametrize(("n_threads", "batch"), [(1, 1), (1, 7), (2, 1), (2, 7), (3, 8)])
def test_loss_and_gradients_are_those_of_the_whole_batch(net, n_threads, batch, autocast, close):
    data = windows(batch)
    nats, gradients = loss_and_gradients(net, net.loss, data)
    got, got_gradients = loss_and_gradients(net, microbatched_loss(net, n_threads), data, autocast)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(nats), rel=1e-3 if autocast else 1e-6)
    for fast, plain in zip(got_gradients, gradients, strict=True):
        assert apart(fast, plain) < close


def test_padding_counts_for_nothing_wherever_it_lies(net):
    ids, targets = windows(8)
    targets[:2] = IGNORE_INDEX  # a micro-batch of padding alone
    targets[5, 3:] = IGNORE_INDEX
    nats, gradients = loss_and_gradients(net, net.loss, (ids, targets))
    got, got_gradients = loss_and_gradients(net, microbatched_loss(net, 2), (ids, targets))
    assert float(got) == pytest.approx(float(nats), rel=1e-6)
    for fast, plain in zip(got_gradients, gradients, strict=True):
        assert apart(fast, plain) < 1e-5
    with torch.no_grad():
        assert microbatched_loss(net, 2)(ids, torch.full_like(targets, IGNORE_INDEX)).isnan()


def test_the_bits_do_not_depend_on_which_thread_is_first(net):
    plain, data = net.loss, windows(9)
    first = loss_and_gradients(net, microbatched_loss(net, 3), data, autocast=True)

    def late(ids, targets):  # the first part is the last one to be done
        time.sleep(0.2 * torch.equal(ids[0], data[0][0]))
        return plain(ids, targets)

    net.loss = late
    second = loss_and_gradients(net, microbatched_loss(net, 3), data, autocast=True)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_weights_that_want_no_gradient_get_none(net):
    net.embedding.weight.requires_grad_(False)
    microbatched_loss(net, 2)(*windows(4)).backward()
    assert net.embedding.weight.grad is None
    assert all(p.grad is not None for p in net.blocks.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_evaluates_without_gradients(net, mode):
    with mode():
        got, expected = (loss(*windows(5)) for loss in (microbatched_loss(net, 2), net.loss))
    assert not got.requires_grad
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_an_error_in_a_thread_is_raised(net):
    ids, targets = windows(4)
    with pytest.raises(IndexError, match="range"):
        microbatched_loss(net, 2)(ids + 50, targets)


def threads_of_a_new_thread() -> int:
    found = []
    asking = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    asking.start()
    asking.join()
    return found[0]


def test_threads_of_the_pool_compute_alone_and_all_others_as_before():
    before = torch.get_num_threads()
    microbatch._threads.cache_clear()
    try:
        torch.set_num_threads(3)
        pool = microbatch._threads(2)
        alone = [pool.submit(torch.get_num_threads).result() for _ in range(4)]
        assert (alone, torch.get_num_threads(), threads_of_a_new_thread()) == ([1] * 4, 3, 3)
    finally:
        torch.set_num_threads(before)
        microbatch._threads.cache_clear()


def test_as_many_threads_as_there_are_when_the_step_is_made(net, monkeypatch):
    made = []
    monkeypatch.setattr(
        microbatch, "_threads", lambda n: made.append(n) or microbatch.ThreadPoolExecutor(n)
    )
    loss = microbatched_loss(net)  # before Lightning has shared the threads out
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    loss(*windows(4))
    assert made == [3]
    loss(*windows(2))  # fewer windows than threads
    assert made == [3]


def test_a_net_with_dropout_keeps_its_own_loss():
    net = GPT(GPTConfig(50, 20, d_model=32, n_layers=2, n_heads=2, d_ff=64, dropout=0.1))
    assert microbatched_loss(net, 2) == net.loss


def test_weights_that_a_subclass_does_not_use_get_zeros():
    class Idle(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.idle = torch.nn.Parameter(torch.ones(3))

        def forward(self, ids, cache=None):
            return super().forward(ids, cache).flip(-1)

    torch.manual_seed(0)
    net = Idle(GPTConfig(50, 20, d_model=32, n_layers=1, n_heads=2, d_ff=64)).use(CPU)
    data = windows(5)
    expected = net.loss(*data)
    expected.backward()
    expected = expected.detach()
    gradient = net.embedding.weight.grad.clone()
    got, (*_,) = loss_and_gradients(net, microbatched_loss(net, 2), data)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)
    assert apart(net.embedding.weight.grad / 3, gradient) < 1e-5
    assert not net.idle.grad.any()
