"""Loss of a model on a split: which tokens are scored, and with how much context."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minigpt.core.settings import UserError
from minigpt.data.windows import TokenWindows
from minigpt.evaluation.loss import Loss, evaluate_loss, windows
from minigpt.model import GPT
from tests.conftest import naming
from tests.evaluation.conftest import make_net, out_of_memory


def random_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 290, n, dtype=np.uint16)


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("stride", [None, 1, 5, 8, 16])
def test_every_token_but_the_first_is_scored_once_with_enough_context(n, stride):
    net, tokens = make_net().eval(), random_tokens(n)
    step = stride or 16
    expected = 0.0
    with torch.no_grad():
        for target in range(1, n):
            first_window = target <= 16
            start = 0 if first_window else math.ceil((target - 16) / step) * step
            assert first_window or target - start > 16 - step
            ids = torch.from_numpy(tokens[start:target].astype(np.int64))[None]
            expected -= F.log_softmax(net(ids)[0, -1].double(), -1)[int(tokens[target])].item()
    loss = evaluate_loss(net, tokens, batch_size=3, stride=stride)
    assert loss.n_tokens == n - 1
    assert loss.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [2, 16, 17, 18, 100])
def test_adjacent_windows_are_those_of_training(n):
    tokens = random_tokens(n)
    training = TokenWindows(tokens, context_length=16)
    starts = training.side_by_side()
    scored = windows(tokens, range(len(starts)), 16, 16)
    assert all(map(torch.equal, scored, training.__getitems__(starts)))


def test_loss_does_not_depend_on_batch_size_and_leaves_the_model_training():
    net, tokens = make_net().train(), random_tokens(333)
    one, many = (evaluate_loss(net, tokens, batch_size) for batch_size in (1, 32))
    assert one.nats == pytest.approx(many.nats, rel=1e-6)
    assert net.training


def test_out_of_memory_names_batch_size(monkeypatch):
    monkeypatch.setattr(GPT, "loss", out_of_memory)
    with pytest.raises(UserError, match=naming("batch_size=32", "batch_size=16")):
        evaluate_loss(make_net(), random_tokens(200))


def test_autocast_is_close_to_float32_but_not_equal():
    net, tokens = make_net(), random_tokens(200)
    exact, mixed = (evaluate_loss(net, tokens, precision=p) for p in ("32-true", "bf16-mixed"))
    assert mixed.nats != exact.nats
    assert mixed.nats == pytest.approx(exact.nats, rel=0.02)


def test_perplexity_and_bits_per_byte_follow_from_the_mean():
    loss = Loss(nats=math.log(8) * 10, n_tokens=10)
    assert loss.perplexity == pytest.approx(8)
    assert loss.bits_per_byte(bytes_per_token=4.0) == pytest.approx(3 / 4)


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_that_skips_tokens_is_refused(stride):
    with pytest.raises(UserError, match=naming("stride", str(stride), "16")):
        evaluate_loss(make_net(), random_tokens(50), stride=stride)
