import itertools
import math

import pytest
import torch
from torch import Tensor

from minigpt.core.settings import UserError
from minigpt.generation import sampling
from minigpt.generation.sampling import (
    SamplingConfig,
    encode_prompt,
    generate,
    generate_stories,
    iterate_stories,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    sample,
    stream_story,
    stream_text,
)
from minigpt.model import GPT, GPTConfig
from minigpt.runs.folder import Run
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming

EOT = 0
GREEDY = SamplingConfig(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A vocabulary of few more than the 256 bytes, so that é is two tokens."""
    return Tokenizer.train(["Once upon a time there was a dragon.", "Once there was a cat."], 270)


@pytest.fixture
def backend() -> str:
    """The backend; tests/kernels/test_decode.py runs some tests with decode.c."""
    return "torch"


def make_model(vocab_size: int = 61, context: int = 16) -> GPT:
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size, context, d_model=16, n_layers=2, n_heads=2, d_ff=24)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def run(model: GPT, prompt: Tensor | list[list[int]], sampling: SamplingConfig) -> Tensor:
    return torch.stack(
        [ids for ids, _ in generate(model, prompt, sampling, EOT)], dim=1
    )  # (B, steps)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 60])
def test_cached_decoding_equals_full_passes_over_the_window(length, backend):
    model = make_model()
    sampling = SamplingConfig(temperature=1.5, max_tokens=40, seed=1, backend=backend)
    window = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(length))
    never = -1  # no token ends a sequence
    steps = list(generate(model, window, sampling, never))
    generator = torch.Generator().manual_seed(1)
    assert len(steps) == 40  # beyond the context of 16, which shifts
    for ids, logits in steps:
        if window.shape[1] > 16:
            window = window[:, -8:]  # the last half, from position 0
        torch.testing.assert_close(logits, model(window)[:, -1])
        assert torch.equal(ids, sample(model(window)[:, -1], sampling, generator))
        window = torch.cat([window, ids[:, None]], dim=1)
    assert (
        len(torch.stack([ids for ids, _ in steps]).unique()) > 20
    )  # no monotone text, which would agree by accident


def test_prompts_of_different_lengths_are_independent():
    model, prompts = make_model(), [[5], [7, 9, 11, 2, 8, 3], list(range(1, 17)), [4] * 30]
    together = run(model, prompts, GREEDY)
    for prompt, ids in zip(prompts, together, strict=True):
        (alone,) = run(model, [prompt], GREEDY)
        assert torch.equal(ids[: len(alone)], alone)


def test_ended_sequences_are_padded_until_all_have_ended():
    prompt = torch.tensor([[1], [2], [1], [2], [1]])
    ids = run(
        make_model(vocab_size=3), prompt, SamplingConfig(temperature=1, seed=5, max_tokens=500)
    )
    ends = [row.index(EOT) for row in ids.tolist()]
    assert len(set(ends)) > 1  # some row had to wait for another
    assert ids.shape[1] == max(ends) + 1 < 500
    for row, end in zip(ids, ends, strict=True):
        assert (row[end:] == EOT).all()


def test_a_seed_fixes_the_text_and_leaves_the_global_random_state_alone():
    model, prompt = make_model(), torch.ones(3, 2, dtype=torch.long)
    state = torch.get_rng_state()
    once, again = (run(model, prompt, SamplingConfig(seed=1, max_tokens=12)) for _ in range(2))
    other = run(model, prompt, SamplingConfig(seed=2, max_tokens=12))
    unseeded = [run(model, prompt, SamplingConfig(max_tokens=12)) for _ in range(2)]
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert not torch.equal(*unseeded)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_works_after_generation_and_between_its_tokens():
    model = make_model().train()
    steps = generate(model, torch.ones(1, 1, dtype=torch.long), GREEDY, EOT)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()  # abandoned halfway
    assert model.training
    ids = torch.ones(1, 5, dtype=torch.long)
    model.loss(ids, ids).backward()
    assert model.embedding.weight.grad is not None


def test_samples_follow_the_softmax_at_the_given_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        ids = sample(logits, SamplingConfig(temperature), generator)
        shares = ids.bincount(minlength=4) / len(ids)
        torch.testing.assert_close(
            shares, (logits[0] / temperature).softmax(-1), atol=0.015, rtol=0
        )


def test_lowest_temperatures_and_strictest_filters_choose_the_most_likely_token():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 5
    generator = torch.Generator().manual_seed(0)
    for settings in (
        {"temperature": 0.0},
        {"temperature": 1e-30},
        {"temperature": 1e-5},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
    ):
        ids = sample(logits, SamplingConfig(**settings), generator)
        assert torch.equal(ids, logits.argmax(-1)), settings


def test_top_k_keeps_k_tokens_among_equal_logits():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    filtered = keep_top_k(logits, 2)
    assert torch.isfinite(filtered).sum(-1).tolist() == [2, 2]
    assert filtered[1].tolist() == [-math.inf, -math.inf, 2.0, 3.0]
    assert torch.equal(keep_top_k(logits, 9), logits)


def test_min_p_keeps_tokens_relative_to_the_most_likely_one():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]]).log() + 3
    assert torch.isfinite(keep_min_p(logits, 0.25)).tolist() == [
        [True] * 3 + [False],
        [True] + [False] * 3,
    ]
    assert torch.equal(keep_min_p(logits, 0.0), logits)


def test_repetition_penalty_equals_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 30, generator=random)
    text = torch.randint(0, 30, (4, 12), generator=random)
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter(1, text, True)
    for penalty in (0.8, 1.0, 1.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(text, logits.clone())
        torch.testing.assert_close(penalise(logits, seen, penalty), expected)


def test_strong_repetition_penalty_prevents_repeats_but_not_the_end_of_text():
    model, prompt = make_model(vocab_size=40), torch.tensor([[EOT, 3, 4]])
    with torch.no_grad():  # logits above 0 for every token
        model.embedding.weight.copy_(model.embedding.weight[1] + 0.01 * model.embedding.weight)
        model.final_norm.bias.copy_(model.embedding.weight[1])
    sampling = SamplingConfig(temperature=0, max_tokens=37, repetition_penalty=100)
    steps = list(generate(model, prompt, sampling, end_of_text=EOT))
    ids = torch.stack([step.ids[0] for step in steps])
    before_the_end = ids[ids != EOT]
    assert len(before_the_end.unique()) == len(before_the_end) > 3
    assert not {3, 4} & set(before_the_end.tolist())
    own = [int(step.logits.argmax()) for step in steps]  # before the penalty
    assert len(set(own)) < len(own)
    assert ids[-1] == EOT  # not penalised, although the prompt has one


@pytest.mark.parametrize(
    ("p", "nucleus"), [(0.3, [3]), (0.5, [3, 1]), (0.75, [3, 1, 0]), (1.0, None)]
)
def test_top_p_keeps_the_smallest_nucleus(p, nucleus):
    probabilities = torch.tensor([[0.2, 0.3, 0.1, 0.4]])
    ids = keep_top_p(probabilities.log(), p).isfinite()[0].nonzero().flatten().tolist()
    assert ids == (sorted(nucleus) if nucleus else [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"temperature": -0.1}, ["temperature", "-0.1"]),
        ({"temperature": math.nan}, ["temperature", "nan"]),
        ({"top_k": 0}, ["top_k", "0"]),
        ({"top_p": 0.0}, ["top_p", "0.0"]),
        ({"top_p": 1.5}, ["top_p", "1.5"]),
        ({"max_tokens": 0}, ["max_tokens", "0"]),
        ({"min_p": -0.1}, ["min_p", "-0.1"]),
        ({"repetition_penalty": 0.0}, ["repetition_penalty", "0.0", "0.01", "100"]),
        ({"repetition_penalty": math.inf}, ["repetition_penalty", "inf", "0.01", "100"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"backend": "onnx"}, ["backend", "onnx", "auto", "torch", "c"]),
    ],
)
def test_invalid_sampling_config_is_refused_by_name(settings, names):
    with pytest.raises(UserError, match=naming(*names)):
        SamplingConfig(**settings)


def test_streamed_pieces_join_to_the_story_of_the_same_seed(tokenizer):
    model = make_model(tokenizer.vocab_size, context=24)
    for prompt, seed in itertools.product(("", "Once upon"), range(3)):
        sampling = SamplingConfig(temperature=1.0, max_tokens=50, seed=seed)
        (story,) = generate_stories(model, tokenizer, prompt, 1, sampling)
        assert "".join(stream_text(model, tokenizer, prompt, sampling)) == story
        assert story


def test_encoded_prompt_begins_with_an_end_of_text(tokenizer):
    assert encode_prompt(tokenizer, "").tolist() == [[EOT]]
    assert encode_prompt(tokenizer, "Once")[0].tolist() == [EOT, *tokenizer.encode("Once")]


def test_stories_of_one_batch_differ_and_stop_before_the_end_of_text(tokenizer):
    model = make_model(tokenizer.vocab_size)
    with torch.no_grad():  # every token as likely as any other
        model.embedding.weight.zero_()
    stories = generate_stories(model, tokenizer, "Once", 4, SamplingConfig(max_tokens=30, seed=1))
    assert len(set(stories)) == 4
    ended = generate_stories(model, tokenizer, "Once", 2, GREEDY)  # equal logits: the first, EOT
    assert ended == ["", ""]


def test_stories_of_different_batches_differ(tokenizer, monkeypatch):
    model, settings = make_model(tokenizer.vocab_size), SamplingConfig(1.5, max_tokens=12, seed=1)
    sizes = []

    def watched(model, rows, *args):
        sizes.append(len(rows))
        return generate(model, rows, *args)

    monkeypatch.setattr(sampling, "GROUP", 4)
    monkeypatch.setattr(sampling, "generate", watched)
    stories = generate_stories(model, tokenizer, "Once", 10, settings)
    assert sizes == [4, 4, 2]
    assert len(set(stories)) == 10
    assert stories == generate_stories(model, tokenizer, "Once", 10, settings)


def test_several_groups_of_stories_are_generated_on_the_gpu(monkeypatch):
    assert sampling.device_for(1000) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sampling.device_for(sampling.GROUP) == "cpu"
    assert sampling.device_for(sampling.GROUP + 1) == "cuda"


def test_iterate_stories_yields_a_story_as_soon_as_it_has_ended(tokenizer, monkeypatch):
    steps = []

    def scripted(model, rows, *args):
        for ids in ([5, 6, EOT], [7, EOT, EOT], [EOT, EOT, EOT]):
            steps.append(ids)
            yield torch.tensor(ids), None

    monkeypatch.setattr(sampling, "generate", scripted)
    model = make_model(tokenizer.vocab_size)
    stories = iterate_stories(model, tokenizer, "Once", 3, GREEDY)
    assert next(stories) == tokenizer.decode([5, 7])  # the others have ended before it
    assert len(steps) == 3
    assert list(stories) == [tokenizer.decode([6]), ""]
    steps.clear()
    monkeypatch.setattr(sampling, "generate", lambda *args: map(reversed_step, scripted(*args)))
    stories = iterate_stories(model, tokenizer, "Once", 3, GREEDY)
    assert next(stories) == ""
    assert len(steps) == 1


def reversed_step(step):
    return step[0].flip(0), None


def test_token_unknown_to_the_tokenizer_is_never_sampled(tokenizer):
    size = tokenizer.vocab_size
    model = make_model(size + 40)
    with torch.no_grad():  # these are the most likely
        model.embedding.weight[size:] = 9 * model.final_norm.bias
    greedy = run(model, [[5]], GREEDY)
    assert (greedy >= size).any()
    steps = list(generate(model, [[5]], GREEDY, EOT, vocab_size=size))
    assert all(ids < size and logits.shape == (1, size) for ids, logits in steps)
    penalised = SamplingConfig(max_tokens=5, seed=1, repetition_penalty=2)
    assert "".join(stream_text(model, tokenizer, "Once", penalised))
    assert iterate_stories(model, tokenizer, "Once", 2, penalised)


def test_generate_refuses_nan_weights():
    model = make_model()
    with torch.no_grad():
        model.final_norm.bias[0] = math.nan
    with pytest.raises(UserError, match="weights"):
        run(model, [[5]], GREEDY)


def test_stream_story_of_a_run(tiny, trained_once):
    folder = trained_once([*tiny, "name=parent"])
    sampling = SamplingConfig(max_tokens=20, seed=1)
    story = "".join(stream_story(folder, "Tom had", sampling))
    run = Run.load(folder)
    assert story
    assert story == "".join(stream_text(run.load_model(), run.tokenizer, "Tom had", sampling))
    assert story == "".join(stream_story(run, "Tom had", sampling))


def stream_of(tokenizer: Tokenizer, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what `stream_text` yields if the model samples `ids`."""
    steps = [sampling.Step(torch.tensor([i]), torch.zeros(1, 1)) for i in ids]
    monkeypatch.setattr(sampling, "generate", lambda *_, **__: iter(steps))
    return list(stream_text(make_model(), tokenizer, "", GREEDY))


@pytest.mark.parametrize(
    "text", ["naïve café", "a 🐉 and 龍!", "日本語", "kept: \ufffd \ufffd\ufffd."]
)
def test_streamed_pieces_hold_complete_characters(text, tokenizer, monkeypatch):
    ids = tokenizer.encode(text)
    assert len(ids) > len(text) // 2
    pieces = stream_of(tokenizer, [*ids, EOT], monkeypatch)
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_streamed_invalid_bytes_equal_those_of_the_tokenizer(tokenizer, monkeypatch):
    dragon = tokenizer.encode("🐉")
    for ids in (dragon[:2], [*dragon[:3], *tokenizer.encode("a")], [*dragon[1:], *dragon]):
        assert "".join(stream_of(tokenizer, ids, monkeypatch)) == tokenizer.decode(ids)
