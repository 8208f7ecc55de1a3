import copy
from itertools import pairwise

import pytest
import torch
from torch.optim import AdamW

from minigpt.model import GPT, GPTConfig
from minigpt.training.config import LARGE_BATCH, OptimizerConfig
from minigpt.training.optim import (
    CombinedOptimizer,
    Muon,
    default_lr,
    default_matrix_lr,
    lr_factor,
    make_optimizer,
    newton_schulz,
    peak_lrs,
    set_weight_decay,
)

TINY = GPTConfig(vocab_size=50, context_length=16, d_model=16, n_layers=1, n_heads=2, d_ff=32)


def net_and_optimizer(**settings) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = GPT(TINY)
    config = OptimizerConfig(**settings)
    return net, make_optimizer(net, config, peak_lrs(config, TINY.d_model))


def train(net: GPT, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 50, (2, 17), generator=generator)
        optimizer.zero_grad()
        net.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_adamw_that_is_not_fused_leaves_foreach_to_pytorch(name, fused):
    config = OptimizerConfig(name=name)
    optimizer = make_optimizer(GPT(TINY), config, peak_lrs(config, TINY.d_model), fused)
    groups = [group for group in optimizer.param_groups if "fused" in group]
    assert len(groups) == 2
    expected = True if fused else None
    assert all(group["fused"] is expected and group["foreach"] is None for group in groups)


def test_cosine_schedule_warms_up_linearly_and_decays_to_zero():
    curve = [lr_factor(step, 110, 10, 0.0) for step in range(110)]
    assert curve[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert curve[10] == 1.0
    assert curve[60] == pytest.approx(0.5)
    assert curve[35] == pytest.approx(0.8536, abs=1e-4)
    assert all(a > b for a, b in pairwise(curve[10:]))
    assert 0 < curve[-1] < 1e-3
    assert lr_factor(110, 110, 10, 0.0) == pytest.approx(0.0)


def test_linear_schedule_decays_linearly():
    curve = [lr_factor(step, 110, 10, 0.2, "linear") for step in range(111)]
    assert curve[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert [curve[10], curve[35], curve[60], curve[110]] == pytest.approx([1.0, 0.8, 0.6, 0.2])


def test_cosine_schedule_ends_at_final_lr():
    assert lr_factor(110, 110, 10, 0.1) == pytest.approx(0.1)
    assert lr_factor(60, 110, 10, 0.1) == pytest.approx(0.55)


def test_default_learning_rates_fall_with_width():
    assert default_lr(128, "adamw") / default_lr(384, "adamw") == pytest.approx(3)
    assert default_lr(128) / default_lr(512) == pytest.approx(2)
    assert default_matrix_lr(128) / default_matrix_lr(512) == pytest.approx(2)
    assert peak_lrs(OptimizerConfig(lr=1e-3), 256) == {
        "lr": 1e-3,
        "matrix_lr": default_matrix_lr(256),
    }
    assert peak_lrs(OptimizerConfig(name="adamw"), 256) == {"lr": default_lr(256, "adamw")}


def test_defaults_follow_a_batch_that_is_larger_than_the_tuned_ones():
    config = OptimizerConfig(warmup_steps=500)
    usual = peak_lrs(config, 128)
    for tokens in (2048, LARGE_BATCH):
        assert (peak_lrs(config, 128, tokens), config.n_warmup_steps(tokens)) == (usual, 500)
    large = peak_lrs(config, 128, 4 * LARGE_BATCH)
    assert large == {name: pytest.approx(2 * lr) for name, lr in usual.items()}
    assert config.n_warmup_steps(4 * LARGE_BATCH) == 125
    typed = OptimizerConfig(lr=1e-3, matrix_lr=2e-3)
    assert peak_lrs(typed, 128, 4 * LARGE_BATCH) == {"lr": 1e-3, "matrix_lr": 2e-3}
    fixed = OptimizerConfig(follow_batch=False)
    assert peak_lrs(fixed, 128, 4 * LARGE_BATCH) == usual
    assert fixed.n_warmup_steps(4 * LARGE_BATCH) == 500


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weight_decay_is_on_matrices_alone_and_every_weight_has_an_optimizer(name):
    net, optimizer = net_and_optimizer(name=name)
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in seen} == {id(p) for p in net.parameters()}
    assert len(seen) == len(list(net.parameters()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() == 2 else 0.0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_final_weight_decay_changes_the_decay_of_matrices_linearly(name):
    settings = {"name": name, "weight_decay": 0.0, "final_weight_decay": 0.4}
    _, optimizer = net_and_optimizer(**settings)
    config = OptimizerConfig(**settings)
    for step, expected in ((0, 0.0), (1, 0.1), (4, 0.4)):
        set_weight_decay(optimizer, config, step, 5)
        for group in optimizer.param_groups:
            matrices = [p.dim() == 2 for p in group["params"]]
            assert all(matrices) or not any(matrices)
            assert group["weight_decay"] == pytest.approx(expected if matrices[0] else 0.0)
    set_weight_decay(optimizer, OptimizerConfig(name=name), 2, 5)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.4)
    set_weight_decay(optimizer, config, 0, 1)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def update_of(gradient: torch.Tensor, normalize_rows: str | None) -> torch.Tensor:
    matrix = torch.nn.Parameter(torch.zeros_like(gradient))
    matrix.grad = gradient.clone()
    Muon([matrix], 1.0, normalize_rows=normalize_rows).step()
    return matrix.detach() / (0.2 * max(gradient.shape) ** 0.5)


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (16, 16)])
def test_muon_normalizes_rows_before_or_after_it_orthogonalises(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradient *= torch.logspace(-3, 0, shape[0])[:, None]  # rows of very different norms
    plain, before, after = (update_of(gradient, how) for how in (None, "before", "after"))
    equal = gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(before, update_of(equal, None))
    rows = after.norm(dim=1)
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    torch.testing.assert_close(after.norm(), plain.norm())
    cosine = torch.cosine_similarity(after, plain, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert not torch.allclose(after, plain, rtol=0.01)
    zeros = update_of(torch.zeros(shape), "before"), update_of(torch.zeros(shape), "after")
    assert all(torch.equal(update, torch.zeros(shape)) for update in zeros)


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_all_other_weights():
    net, optimizer = net_and_optimizer()
    assert isinstance(optimizer, CombinedOptimizer)
    adamw, muon = optimizer.parts
    assert isinstance(adamw, AdamW)
    assert isinstance(muon, Muon)
    inside = [p for p in net.blocks.parameters() if p.dim() == 2]
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(p) for p in inside]
    before = copy.deepcopy(net)
    train(net, optimizer, range(1))
    # match_rms_adamw: the update of a matrix has about the root mean square lr · 0.2.
    pairs = zip(before.blocks.named_parameters(), net.blocks.parameters(), strict=True)
    for (name, old), new in pairs:
        if old.dim() == 2:
            size = (new - old).square().mean().sqrt() / (0.2 * default_matrix_lr(16))
            assert 0.6 < size < 1.3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_step_equals_that_of_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 16), (16, 48)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    peer = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Muon(ours, 1e-2, momentum=0.9, weight_decay=0.2, dtype=dtype)
    reference = torch.optim.Muon(
        peer, 1e-2, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for p, q in zip(ours, peer, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=generator)
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        reference.step()
        for p, q, old in zip(ours, peer, before, strict=True):
            # torch rounds to bfloat16 in every product: a few parts in a hundred of the update.
            assert (p - q).norm() < 0.05 * (q - old).norm()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_muon_updates_on_threads_equal_those_of_a_graph_bit_for_bit(n_threads):
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 16), (16, 48)]
    threaded = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    batched = [torch.nn.Parameter(p.detach().clone()) for p in threaded]
    optimizer, reference = Muon(threaded, 1e-2), Muon(batched, 1e-2, graphed=True)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for _ in range(3):
            for p, q in zip(threaded, batched, strict=True):
                p.grad = q.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            reference.step()
        assert all(map(torch.equal, threaded, batched))
    finally:
        torch.set_num_threads(before)


def test_newton_schulz_brings_every_singular_value_near_one():
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for x in (matrices, matrices.mT):
        values = torch.linalg.svdvals(newton_schulz(x))
        assert values.min() > 0.6
        assert values.max() < 1.3
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        cosine = torch.cosine_similarity(newton_schulz(x).flatten(1), (left @ right).flatten(1))
        assert cosine.min() > 0.97


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_loaded_optimizer_state_continues_bit_exactly(name):
    net, optimizer = net_and_optimizer(name=name)
    train(net, optimizer, range(3))
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, range(3, 6))
    again, fresh = net_and_optimizer(name=name)
    again.load_state_dict(state[0])
    fresh.load_state_dict(state[1])
    train(again, fresh, range(3, 6))
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_closure_is_called_once_with_gradients_enabled():
    optimizer = net_and_optimizer()[1]
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7.0  # type: ignore[arg-type]
    assert calls == [True]
