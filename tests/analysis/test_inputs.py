"""Every function that reads a model's activations names an argument that it cannot use."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.analysis.activations import activations
from minigpt.analysis.attention import attention_weights, head_scores
from minigpt.analysis.interventions import ablate_heads, patch_heads, patch_residual
from minigpt.analysis.lens import logit_attribution, logit_lens
from minigpt.core.settings import UserError
from minigpt.model import GPT, GPTConfig
from tests.conftest import naming

IDS = torch.tensor([[3, 1, 4, 1, 5]])
TARGETS = torch.tensor([1, 4, 1, 5, 9])
ONE = "logit_lens", "logit_attribution", "attention_weights"


@pytest.fixture
def net() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 12, d_model=16, n_layers=2, n_heads=4, d_ff=32, dropout=0.5)).eval()


def readers(net: GPT) -> dict[str, tuple[Callable[[Any], Any], str]]:
    """Return functions of ids, each with the name of this argument."""
    return {
        "activations": (lambda ids: activations(net, ids), "ids"),
        "attention_weights": (lambda ids: attention_weights(net, ids), "ids"),
        "logit_lens": (lambda ids: logit_lens(net, ids), "ids"),
        "logit_attribution": (lambda ids: logit_attribution(net, ids, TARGETS), "ids"),
        "ablate_heads": (lambda ids: ablate_heads(net, ids, [(0, 1)]), "ids"),
        "patch_heads": (lambda ids: patch_heads(net, IDS, ids, metric), "corrupted"),
        "patch_residual": (lambda ids: patch_residual(net, ids, IDS, metric), "clean"),
    }


def metric(logits: Tensor) -> float:
    return logits[0, -1, 7].item()


@pytest.mark.parametrize("reader", list(readers(GPT(GPTConfig(50, 12, 16, 2, 4, 32)))))
@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (IDS[:, :0], "(1, 0)"),
        (IDS[0], "(5,)"),
        (IDS.float(), "torch.float32"),
        ([3, 1, 4], "list"),
        ("Tom had a dog.", "str"),
        (torch.tensor([[3, 1, 50, 1, 5]]), "50"),
        (torch.tensor([[3, 1, -1, 1, 5]]), "-1"),
        (torch.ones(1, 13, dtype=torch.long), "12"),
    ],
)
def test_ids_that_the_model_cannot_read_are_named(net, reader, ids, named):
    read, argument = readers(net)[reader]
    with pytest.raises(UserError, match=naming(argument)) as caught:
        read(ids)
    assert named in str(caught.value)


@pytest.mark.parametrize("reader", ONE)
def test_two_sequences_are_refused_where_the_result_is_of_one(net, reader):
    read, argument = readers(net)[reader]
    with pytest.raises(UserError, match=naming(argument)):
        read(IDS.repeat(2, 1))


@pytest.mark.parametrize("name", ["targets", "reference"])
@pytest.mark.parametrize("wrong", [TARGETS[:4], TARGETS[None], TARGETS[0], TARGETS + 45])
def test_targets_that_are_not_one_token_a_position_are_named(net, name, wrong):
    given = {"targets": TARGETS, "reference": TARGETS, name: wrong}
    with pytest.raises(UserError, match=naming(name)):
        logit_attribution(net, IDS, **given)


@pytest.mark.parametrize("pair", [3, (0, 0.5), (0,), (0, 1, 2), None, (2, 0), (0, 4), (-1, 0)])
def test_heads_that_are_not_pairs_of_the_model_are_named(net, pair):
    with pytest.raises(UserError, match=naming("heads", str(pair))):
        ablate_heads(net, IDS, [pair])


@pytest.mark.parametrize("edit", [lambda x: None, lambda x: x[:, 1:]])
def test_edit_that_returns_another_shape_is_named(net, edit):
    name = "blocks.1.feed_forward"
    with pytest.raises(UserError, match=naming("edits", name)):
        activations(net, IDS, {name: edit})


def test_dropout_is_off_also_for_a_model_in_training(net):
    expected, scores = attention_weights(net, IDS), head_scores(net)
    net.train()
    assert torch.equal(attention_weights(net, IDS), expected)
    assert torch.equal(head_scores(net).induction, scores.induction)
    assert net.training
