"""Cross-entropy in chunks gives the loss and the gradients of PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from minigpt.kernels.cross_entropy import CHUNK, chunked_cross_entropy
from minigpt.model import IGNORE_INDEX
from tests.kernels.test_cpu import apart


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


@pytest.mark.parametrize(("autocast", "close"), [(False, 1e-5), (True, 1e-2)])
@pytest.mark.parametrize("ignored", [0, 7])
def test_chunked_cross_entropy_and_its_gradients_are_those_of_cross_entropy(
    autocast, close, ignored
):
    torch.manual_seed(0)
    hidden = torch.randn(3, CHUNK // 2, 16, requires_grad=True)  # one chunk and a half
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, hidden.shape[:2])
    targets[0, :ignored] = IGNORE_INDEX
    results = []
    for function in (linear_cross_entropy, chunked_cross_entropy):
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(hidden, weight, targets)
        (3 * loss).backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    (loss, *grads), (fast_loss, *fast_grads) = results
    assert fast_loss.dtype == torch.float32
    assert float(fast_loss) == pytest.approx(float(loss), rel=1e-3 if autocast else 1e-6)
    for fast, plain in zip(fast_grads, grads, strict=True):
        assert apart(fast, plain) < close
    with torch.no_grad():
        evaluated = chunked_cross_entropy(hidden, weight, targets)
        expected = linear_cross_entropy(hidden, weight, targets)
    assert float(evaluated) == pytest.approx(float(expected))
