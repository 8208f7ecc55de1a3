"""A recorded loss has the values and the gradients of the loss; on a CPU the recording is run."""

import pytest
import torch

from minigpt.kernels.choice import kernels_for
from minigpt.kernels.cuda_graph import graphed_loss
from minigpt.kernels.distillation import Distillation
from tests.kernels.test_distillation import batch, models


def accumulated(model, loss, batches) -> list[torch.Tensor]:
    """Return the accumulated gradients of several batches, each divided by 4.

    Division by a power of 2 is exact, also before gradients are rounded to bfloat16.
    """
    model.zero_grad()
    for pair in batches:
        (loss(*pair).flatten()[0] / 4).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("taught", [False, True])
def test_graphed_loss_and_its_accumulated_gradients_are_those_of_the_loss(taught, mixed):
    model, teacher = (model.use(kernels_for("cuda")) for model in models(2))
    teacher.requires_grad_(False)
    plain = Distillation(model, [teacher]) if taught else model.loss
    graphed = graphed_loss(model, plain, model.loss)

    def autocast(function):  # per batch, as in Lightning
        def result(ids, targets):
            with torch.autocast("cpu", torch.bfloat16, mixed):
                return function(ids, targets)

        return result

    expected, actual = autocast(plain), autocast(graphed)
    batches = [batch(), batch(), batch(3)]  # two shapes
    for pair in batches:
        torch.testing.assert_close(actual(*pair), expected(*pair))
    first = actual(*batches[0])
    actual(*batches[1])  # must not change the first result
    torch.testing.assert_close(first, expected(*batches[0]))
    gradients = accumulated(model, actual, batches)
    for gradient, wanted in zip(gradients, accumulated(model, expected, batches), strict=True):
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
