"""A recorded loss has the values and the gradients of the loss; on a CPU the recording is run."""

import pytest
import torch

from minigpt.kernels.choice import kernels_for
from minigpt.kernels.cuda_graph import graphed_loss
from minigpt.kernels.distillation import Distillation
from tests.kernels.test_distillation import batch, models


def accumulated(model, loss, batches) -> list[torch.Tensor]:
    """Return the gradients of the mean loss of several batches, accumulated one by one."""
    model.zero_grad()
    for ids, targets in batches:
        (loss(ids, targets).flatten()[0] / len(batches)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("taught", [False, True])
def test_graphed_loss_and_its_accumulated_gradients_are_those_of_the_loss(taught, autocast):
    model, teacher = (model.use(kernels_for("cuda")) for model in models(2))
    teacher.requires_grad_(False)
    loss = Distillation(model, [teacher]) if taught else model.loss
    graphed = graphed_loss(model, loss, model.loss)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        batches = [batch(), batch(), batch(3)]  # two shapes
        for ids, targets in batches:
            torch.testing.assert_close(graphed(ids, targets), loss(ids, targets))
        kept = graphed(*batches[0])
        graphed(*batches[1])  # must not change the first result
        torch.testing.assert_close(kept, loss(*batches[0]))
        expected, actual = (accumulated(model, x, batches) for x in (loss, graphed))
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_graphed_loss_without_gradients_is_the_whole_loss():
    (model,) = models(1)
    calls = []

    def loss(ids, targets):
        calls.append(ids)
        return model.loss(ids, targets)

    with torch.no_grad():
        value = graphed_loss(model, loss, model.loss)(*batch())
    assert not value.requires_grad
    assert calls == []
