import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minigpt.kernels.choice import fused_attention
from minigpt.kernels.cpu import CPU
from minigpt.model import (
    GPT,
    IGNORE_INDEX,
    GPTConfig,
    Kernels,
    KVCache,
    sinusoids,
)
from tests.conftest import naming

SIZES = {
    "small": (GPTConfig(d_model=128, n_heads=4, d_ff=256), 1_046_656),
    "medium": (GPTConfig(d_model=256, n_heads=8, d_ff=512), 3_404_032),
    "large": (GPTConfig(d_model=384, n_heads=12, d_ff=768), 7_072_128),
}
TINY = GPTConfig(vocab_size=61, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=24)


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Return a model in which every parameter differs from its initial 0 or 1."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def random_ids(config: GPTConfig, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_parameters_of_the_three_sizes(size):
    config, expected = SIZES[size]
    model = GPT(config)
    assert model.n_parameters == expected
    assert model.embedding.weight.numel() == 3000 * config.d_model


@pytest.mark.parametrize("size", SIZES)
def test_initial_loss_is_that_of_a_uniform_guess(size):
    config, _ = SIZES[size]
    ids = random_ids(config, 2, config.context_length + 1)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            loss = GPT(config).loss(ids[:, :-1], ids[:, 1:]).item()
        assert loss == pytest.approx(math.log(3000), abs=0.1), f"seed {seed}"


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"d_model": 100, "n_heads": 8}, ["d_model", "100", "n_heads", "8"]),
        ({"d_model": 15, "n_heads": 3}, ["d_model", "15"]),
        ({"n_layers": 0}, ["n_layers", "0"]),
        ({"context_length": -1}, ["context_length", "-1"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"embedding_scale": 0.0}, ["embedding_scale", "0.0"]),
    ],
)
def test_invalid_gpt_config_is_refused_by_name(settings, names):
    with pytest.raises(ValueError, match=naming(*names)):
        GPTConfig(**settings)


def test_sinusoids_follow_the_formula():
    length, d = 50, 12
    table = sinusoids(length, d)
    assert table.dtype == torch.float32
    for t in range(length):
        for i in range(d // 2):
            angle = t / 10000 ** (2 * i / d)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
def test_logits_equal_those_of_gpt2_in_transformers_with_the_same_weights(scale):
    config = replace(SIZES["small"][0], vocab_size=500, embedding_scale=scale)
    model = random_model(config)
    ids = random_ids(config, 2, config.context_length)
    with torch.no_grad():
        ours, theirs = model(ids), as_gpt2(model)(ids).logits
    assert theirs.std() > 0.5  # the weights are large enough for a difference to show
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def as_gpt2(model: GPT) -> nn.Module:
    """Return the GPT-2 of transformers with the weights of `model`; its matrices are (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.context_length,
            n_embd=c.d_model,
            n_layer=c.n_layers,
            n_head=c.n_heads,
            n_inner=c.d_ff,
            activation_function="gelu",
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    scale = c.embedding_scale or math.sqrt(c.d_model)
    weights = {
        "wte.weight": model.embedding.weight * scale,  # their output is this one too, hence / scale
        "wpe.weight": sinusoids(c.context_length, c.d_model),
        "ln_f.weight": model.final_norm.weight / scale,
        "ln_f.bias": model.final_norm.bias / scale,
    }
    names = {
        "norm1": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "norm2": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    for layer, block in enumerate(model.blocks):
        for ours, theirs_name in names.items():
            module = block.get_submodule(ours)
            weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
            weights[f"h.{layer}.{theirs_name}.weight"] = weight
            weights[f"h.{layer}.{theirs_name}.bias"] = module.bias
    theirs.transformer.load_state_dict(weights)
    return theirs


def test_residual_init_changes_the_weights_of_sublayer_outputs_alone():
    models = {}
    for choice in ("scaled", "wide", "zero"):
        torch.manual_seed(0)
        models[choice] = GPT(replace(SIZES["small"][0], residual_init=choice)).state_dict()
    stds = {"scaled": 0.02 / math.sqrt(10), "wide": 128**-0.5, "zero": 0.0}
    for name, weight in models["scaled"].items():
        for choice, std in stds.items():
            if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                assert models[choice][name].std() == pytest.approx(std, rel=0.05)
            else:
                assert torch.equal(models[choice][name], weight)


def test_embedding_scale_of_one_leaves_embeddings_unscaled():
    model = random_model(replace(TINY, embedding_scale=1.0))
    ids = random_ids(TINY, 2, 5)
    x = model.embedding.weight[ids] + sinusoids(16, 16)[:5]
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(model.hidden(ids), model.final_norm(x))


@pytest.mark.parametrize("kernels", [Kernels(), Kernels(attention=fused_attention), CPU])
def test_attention_is_causal(kernels):
    model, t = random_model(TINY).use(kernels), 6
    ids = random_ids(TINY, 1, 16)
    changed = ids.clone()
    changed[0, t] = (ids[0, t] + 1) % TINY.vocab_size
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(dim=(0, 2))  # (T,)
    assert (difference[:t] == 0).all()
    assert (difference[t:] > 1e-4).all()


def test_sequences_of_a_batch_are_independent():
    model = random_model(TINY)
    ids = random_ids(TINY, 5, 16)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in ids])
        torch.testing.assert_close(model(ids), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", [Kernels(), Kernels(attention=fused_attention), CPU])
def test_logits_with_a_cache_equal_those_of_one_pass(kernels):
    model = random_model(TINY).use(kernels)
    ids = random_ids(TINY, 3, 16)
    cache = KVCache(16)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in ids.split([1, 6, 1, 3, 5], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-5)
    assert cache.length == 16
    with pytest.raises(ValueError, match=naming("17", "16")):
        model(ids[:, :1], cache)


def test_sequences_of_a_kv_cache_may_differ_in_length():
    model, lengths = random_model(TINY), [3, 9, 5]
    ids, cache = random_ids(TINY, 3, 9), KVCache(16)
    following = random_ids(TINY, 3, 4)
    with torch.no_grad():
        model(ids, cache)
        cache.truncate(lengths)
        pieces = [model(new, cache) for new in following.split([1, 3], dim=1)]
        for row, length in enumerate(lengths):
            alone = model(torch.cat([ids[row, :length], following[row]])[None])[0, length:]
            result = torch.cat(pieces, dim=1)[row]
            torch.testing.assert_close(result, alone, atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [7, 13, 9]
    assert cache.length == 13


def test_kv_cache_is_written_in_place():
    model, cache = random_model(TINY), KVCache(16)
    with torch.no_grad():
        model(random_ids(TINY, 2, 5), cache)
        addresses = [layer.data_ptr() for layer in cache.layers]
        for _ in range(11):
            model(random_ids(TINY, 2, 1), cache)
    assert [layer.data_ptr() for layer in cache.layers] == addresses
    assert {tuple(layer.shape) for layer in cache.layers} == {(2, 2, 2, 16, 8)}


def test_gradients_with_a_cache_are_those_without():
    model, ids = random_model(TINY), random_ids(TINY, 2, 5)
    model(ids, KVCache(5)).sum().backward()
    with_cache = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(ids).sum().backward()
    for result, expected in zip(with_cache, model.parameters(), strict=True):
        torch.testing.assert_close(result, expected.grad)


class Flipped(GPT):
    """A subclass that overrides forward."""

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return super().forward(ids, cache).flip(-1)


class Louder(GPT):
    """A subclass that overrides hidden."""

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return 2 * super().hidden(ids, cache)


class Uncached(GPT):
    """A subclass whose forward takes no cache."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).flip(-1)


@pytest.mark.parametrize("kernels", [Kernels(), CPU])
@pytest.mark.parametrize("cls", [GPT, Flipped, Louder, Uncached])
def test_the_loss_of_a_subclass_is_the_cross_entropy_of_its_forward(cls, kernels):
    torch.manual_seed(0)
    model, ids = cls(TINY).use(kernels), random_ids(TINY, 3, 17)
    ids, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1, 4:] = IGNORE_INDEX
    logits = model(ids)
    expected = nn.functional.cross_entropy(logits[targets >= 0], targets[targets >= 0])
    torch.testing.assert_close(model.loss(ids, targets), expected)
    if cls is not GPT:
        assert not torch.allclose(logits, GPT.forward(random_model(TINY), ids))
    plain = GPT(TINY)
    plain.load_state_dict(model.state_dict())
    same = torch.allclose(model.loss(ids, targets), plain.loss(ids, targets), atol=1e-4)
    assert same is (cls is GPT)


def test_use_sets_the_kernels_of_all_modules():
    model = random_model(TINY).use(CPU)
    assert model.kernels == model.blocks[1].attention.kernels == CPU
    assert copy.deepcopy(model).use(Kernels()).blocks[0].attention.kernels.name == "torch"
    assert random_model(TINY).kernels.name == "torch"
    assert model.kernels.name == "cpu"


def test_embedding_and_output_stay_tied_after_saving_and_loading(tmp_path):
    torch.save(random_model(TINY, seed=1).state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    tables = [name for name, weight in weights.items() if weight.shape == (61, 16)]
    assert tables == ["embedding.weight"]
    assert "positions" not in weights  # computed, so not saved

    model = GPT(TINY).eval()
    model.load_state_dict(weights)
    ids = torch.tensor([[3]])
    before = model(ids)
    with torch.no_grad():
        model.embedding.weight[5] += 1.0  # not among the inputs: only the output can change
    changed = (model(ids) - before).flatten().nonzero().flatten().tolist()
    assert changed == [5]


def test_padding_is_not_scored():
    model, ids = random_model(TINY), random_ids(TINY, 1, 9)
    targets = ids[:, 1:].clone()
    expected = model.loss(ids[:, :5], targets[:, :5])
    targets[:, 5:] = -100
    torch.testing.assert_close(model.loss(ids[:, :-1], targets), expected)


def test_dropout_is_random_in_training_and_absent_in_evaluation():
    model, ids = random_model(replace(TINY, dropout=0.5)), random_ids(TINY, 1, 8)
    torch.testing.assert_close(model(ids), model(ids))
    model.train()
    assert not torch.allclose(model(ids), model(ids))


def test_flops_of_a_training_step_follow_the_formula():
    c, _ = SIZES["medium"]
    matrices = 3000 * 256 + 5 * (4 * 256 * 256 + 2 * 256 * 512)
    assert GPT(c).flops_per_token() == 6 * matrices + 12 * 5 * 256 * 256
