"""The objective of a student equals its formula, and so does its gradient."""

import pytest
import torch
import torch.nn.functional as F

from minigpt.kernels.cpu import CPU
from minigpt.kernels.cross_entropy import CHUNK
from minigpt.kernels.distillation import Distillation
from minigpt.kernels.microbatch import microbatched_loss
from minigpt.model import GPT, IGNORE_INDEX, GPTConfig

SHAPE = {"vocab_size": 61, "context_length": 16, "n_layers": 2, "d_ff": 24}


def models(n: int, cls: type[GPT] = GPT) -> list[GPT]:
    """Return n models with logits of a trained model's size; the first is 8 wide, the rest 16."""
    torch.manual_seed(0)
    result = []
    for i in range(n):
        model = cls(GPTConfig(**SHAPE, d_model=16 if i else 8, n_heads=2))
        torch.nn.init.normal_(model.embedding.weight)
        result.append(model)
    return result


def batch(n_windows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, SHAPE["vocab_size"], (n_windows, SHAPE["context_length"] + 1))
    targets = ids[:, 1:].clone()
    targets[0, 3:7] = IGNORE_INDEX
    return ids[:, :-1], targets


def formula(student, teachers, ids, targets, weight, temperature):
    """(1 − w) CE + w τ² KL over the scored tokens, as the paper writes it."""
    scored = targets.flatten() != IGNORE_INDEX
    logits = student(ids).flatten(0, 1)[scored]
    ce = F.cross_entropy(logits, targets.flatten()[scored])
    with torch.no_grad():
        each = [(t(ids).flatten(0, 1)[scored] / temperature).softmax(-1) for t in teachers]
    q = torch.stack(each).mean(0)
    kl = F.kl_div((logits / temperature).log_softmax(-1), q, reduction="batchmean")
    return torch.stack([(1 - weight) * ce + weight * temperature**2 * kl, ce, kl])


def gradients(model: GPT, objective: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(objective, list(model.parameters())))


class OwnForward(GPT):
    """A model whose logits are not hidden times embedding."""

    def forward(self, ids, cache=None):
        return 2 * super().forward(ids, cache)


@pytest.mark.parametrize("cls", [GPT, OwnForward])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("n_teachers", [1, 3])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distillation_equals_its_formula(cls, temperature, n_teachers, weight):
    student, *teachers = models(1 + n_teachers, cls)
    ids, targets = batch()
    expected = formula(student, teachers, ids, targets, weight, temperature)
    actual = Distillation(student, teachers, weight, temperature)(ids, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(student, actual[0]), gradients(student, expected[0]), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_teachers", [1, 3])
def test_teachers_in_bfloat16_teach_a_student_in_float32(n_teachers):
    student, *teachers = models(1 + n_teachers)
    ids, targets = batch()
    expected = formula(student, teachers, ids, targets, 0.5, 1.0)
    actual = Distillation(student, teachers, dtype=torch.bfloat16)(ids, targets)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    pairs = zip(gradients(student, actual[0]), gradients(student, expected[0]), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("n_teachers", [1, 3])
def test_divergence_is_right_where_the_probability_of_the_target_underflows(n_teachers):
    student, *teachers = models(1 + n_teachers)
    ids, targets = batch()
    expected = formula(student, teachers, ids, targets, 1.0, 0.02)
    actual = Distillation(student, teachers, 1.0, 0.02)(ids, targets)
    assert expected[2] > 1
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-3, atol=1e-3)


def test_distillation_from_itself_has_no_divergence_and_no_gradient():
    student, *_ = models(1)
    objective, ce, kl = Distillation(student, [student], weight=1.0)(*batch()).unbind()
    assert abs(float(kl.detach())) < 1e-5
    assert float(ce.detach()) > 1
    assert max(float(g.abs().max()) for g in gradients(student, objective)) < 1e-7


def test_distillation_of_weight_0_has_the_gradient_of_the_loss():
    student, teacher = (model.use(CPU) for model in models(2))
    ids, targets = batch()
    objective = Distillation(student, [teacher], weight=0.0)(ids, targets)[0]
    loss = student.loss(ids, targets)
    assert objective.item() == pytest.approx(loss.item(), rel=1e-6)
    for gradient, wanted in zip(
        gradients(student, objective), gradients(student, loss), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_distillation_in_chunks_and_micro_batches_is_that_of_the_batch():
    student, teacher = models(2)
    ids, targets = batch(2 * CHUNK // SHAPE["context_length"] + 3)
    objective = Distillation(student, [teacher], 0.5, 1.5)
    expected = formula(student, [teacher], ids, targets, 0.5, 1.5)
    wanted = gradients(student, expected[0])
    for actual in (objective(ids, targets), microbatched_loss(student, 2, objective)(ids, targets)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients(student, actual[0]), wanted, rtol=1e-3, atol=1e-5)


def test_distillation_in_bfloat16_is_close_to_float32():
    student, teacher = models(2)
    ids, targets = batch(64)
    expected = Distillation(student, [teacher])(ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        actual = Distillation(student, [teacher])(ids, targets)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
