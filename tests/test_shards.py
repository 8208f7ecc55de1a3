"""A batch in shards, on several threads, gives what the net gives for the whole of it."""

import pytest
import torch

from minigpt import shards
from minigpt.fast import accelerate
from minigpt.model import GPT, IGNORE_INDEX, GPTConfig
from minigpt.shards import sharded_loss
from tests.test_fast import apart


@pytest.fixture
def net(monkeypatch) -> GPT:
    monkeypatch.setattr(shards, "TOKENS", 40)  # two windows
    torch.manual_seed(0)
    return accelerate(GPT(GPTConfig(50, 20, d_model=32, n_layers=2, n_heads=2, d_ff=64)))


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
    got, got_gradients = loss_and_gradients(net, sharded_loss(net, n_threads), data, autocast)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(nats), rel=1e-3 if autocast else 1e-6)
    for fast, plain in zip(got_gradients, gradients, strict=True):
        assert apart(fast, plain) < close


def test_padding_counts_for_nothing_wherever_it_lies(net):
    ids, targets = windows(8)
    targets[:2] = IGNORE_INDEX  # a shard of padding alone
    targets[5, 3:] = IGNORE_INDEX
    nats, gradients = loss_and_gradients(net, net.loss, (ids, targets))
    got, got_gradients = loss_and_gradients(net, sharded_loss(net, 2), (ids, targets))
    assert float(got) == pytest.approx(float(nats), rel=1e-6)
    for fast, plain in zip(got_gradients, gradients, strict=True):
        assert apart(fast, plain) < 1e-5
    with torch.no_grad():
        assert sharded_loss(net, 2)(ids, torch.full_like(targets, IGNORE_INDEX)).isnan()


def test_two_runs_give_the_same_bits(net):
    first, second = (
        loss_and_gradients(net, sharded_loss(net, 3), windows(9), autocast=True) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_weights_that_want_no_gradient_get_none(net):
    net.embedding.weight.requires_grad_(False)
    sharded_loss(net, 2)(*windows(4)).backward()
    assert net.embedding.weight.grad is None
    assert all(p.grad is not None for p in net.blocks.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_evaluates_without_gradients(net, mode):
    with mode():
        got, expected = (loss(*windows(5)) for loss in (sharded_loss(net, 2), net.loss))
    assert not got.requires_grad
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_an_error_in_a_thread_is_raised(net):
    ids, targets = windows(4)
    with pytest.raises(IndexError, match="out of range"):
        sharded_loss(net, 2)(ids + 50, targets)


def test_operators_outside_keep_their_threads(net):
    before = torch.get_num_threads()
    sharded_loss(net, 2)(*windows(4))
    assert torch.get_num_threads() == before


def test_a_net_with_dropout_keeps_its_own_loss():
    net = GPT(GPTConfig(50, 20, d_model=32, n_layers=2, n_heads=2, d_ff=64, dropout=0.1))
    assert sharded_loss(net, 2) == net.loss
