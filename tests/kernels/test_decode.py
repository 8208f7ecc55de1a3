"""Tests of decode.c, and tests of generation with the c backend."""

import ctypes
import gc
import subprocess
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from minigpt.core.settings import UserError
from minigpt.generation import decoder as decoder_module
from minigpt.generation.decoder import CachedBatch, Decoder
from minigpt.generation.sampling import SamplingConfig, generate, stream_text
from minigpt.kernels import decode
from minigpt.kernels.sampler import Sampler, SamplerStruct
from minigpt.model import GPT, GPTConfig
from minigpt.tokenizer import Tokenizer
from tests.conftest import naming
from tests.generation.test_decoder import (  # noqa: F401 - tests, with the backend below
    Flipped,
    make_model,
    random_ids,
    test_an_id_outside_the_vocabulary_is_an_index_error,
    test_bfloat16_model_is_decoded_in_bfloat16_with_float32_logits,
    test_changed_weights_are_packed_again,
    test_failed_read_leaves_the_sequences_unchanged,
    test_float16_model_on_a_cpu_is_decoded_in_float32,
    test_logits_of_each_sequence_equal_a_full_pass_over_its_window,
    test_logits_of_the_medium_size_after_a_context_shift,
    test_nan_weights_give_nan_logits,
)
from tests.generation.test_sampling import (  # noqa: F401
    test_cached_decoding_equals_full_passes_over_the_window,
)

FASTER_BUILD = [flag.replace("-O3", "-O1") for flag in decode._FLAGS]

needs_compiler = pytest.mark.skipif(decode.compiler() is None, reason="no C compiler")


@pytest.fixture
def backend() -> str:
    if decode.compiler() is None:
        pytest.skip("no C compiler")
    return "c"


def choose(logits: torch.Tensor, points: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Tokens that decode.c chooses from logits (B, V) with random numbers (B,)."""
    sampler = Sampler(*logits.shape, -1, **settings)
    ids = torch.empty(len(logits), dtype=torch.long)
    struct = sampler.prepare(points, ids, logits.shape[1])
    arrays = (ctypes.c_void_p(x.data_ptr()) for x in (logits, points, ids))
    library = decode.library()
    assert library is not None
    library.sample(ctypes.byref(struct), 0, len(logits), *arrays)
    return ids


def read(model: GPT, ids: torch.Tensor, threads: int = 1) -> torch.Tensor:
    """Logits of the last 3 tokens of each row of `ids` (B, T)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            decoder = Decoder(model, list(ids[:, :-3]), "c")
            assert isinstance(decoder.batch, decode.Batch)
            return torch.stack([decoder.read(new) for new in ids[:, -3:].unbind(1)], dim=1)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [*range(1, 9), 13, 26])
def test_logits_of_any_batch_size_and_thread_count_equal_a_full_pass(rows, dtype):
    torch.manual_seed(0)  # widths that are no multiples of a panel, heads wider than one
    model = GPT(GPTConfig(71, 80, d_model=84, n_layers=2, n_heads=2, d_ff=50)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, 71, (rows, 40))
    expected = model(ids)[:, -3:]
    model = model.to(dtype)
    near = {} if dtype == torch.float32 else {"rtol": 0, "atol": 0.05 * expected.abs().max()}
    for threads in (1, 2, 3):
        torch.testing.assert_close(read(model, ids, threads), expected, **near)


@needs_compiler
@pytest.mark.parametrize("rows", [3, 26])
def test_logits_of_sequences_of_different_lengths_on_uneven_threads(rows):
    torch.manual_seed(0)
    model = GPT(GPTConfig(71, 80, d_model=82, n_layers=2, n_heads=2, d_ff=50)).eval()
    model.requires_grad_(False)
    prompts = [torch.randint(0, 71, (n,)) for n in torch.randint(0, 79, (rows,)).tolist()]
    new = torch.randint(0, 71, (rows,))
    pairs = zip(prompts, new, strict=True)
    expected = [model(torch.cat([prompt, one[None]])[None])[0, -1] for prompt, one in pairs]
    for threads in (1, 2, 3, 4):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                decoder = Decoder(model, prompts, "c")
                torch.testing.assert_close(decoder.read(new), torch.stack(expected))
        finally:
            torch.set_num_threads(before)
        assert isinstance(decoder.batch, decode.Batch)
        for block in decoder.batch._blocks:  # padding for reads beyond the last value
            assert block.numel() == 2 * rows * 2 * 82 * decode.PANEL + decode.PANEL


@needs_compiler
def test_avx_512_build_gives_the_same_logits_and_samples(monkeypatch, tmp_path):
    """Compilers emulate sixteen lanes on CPUs without AVX-512."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(decode, "_FLAGS", FASTER_BUILD)
    wide = decode._compile([*decode.compiler(), "-D__AVX512F__", "-Wno-psabi", "-fopenmp"])
    monkeypatch.setattr(decode, "library", lambda: decode._open(wide))
    torch.manual_seed(0)
    model = GPT(GPTConfig(71, 80, d_model=84, n_layers=2, n_heads=2, d_ff=50)).eval()
    ids = torch.randint(0, 71, (9, 40))
    model.requires_grad_(False)
    expected = model(ids)[:, -3:]
    torch.testing.assert_close(read(model, ids, 2), expected)
    near = 0.05 * float(expected.abs().max())
    torch.testing.assert_close(read(model.bfloat16(), ids, 2), expected, rtol=0, atol=near)
    logits, points = torch.randn(9, 71), torch.rand(9)
    mass = logits.softmax(-1).cumsum(-1)
    assert choose(logits, points).tolist() == [
        int(torch.searchsorted(row, point)) for row, point in zip(mass, points, strict=True)
    ]


@needs_compiler
def test_default_dtype_and_mixed_dtypes_do_not_change_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(71, 80, d_model=64, n_layers=1, n_heads=2, d_ff=64)).eval()
    ids = torch.randint(0, 71, (5, 9))
    model.requires_grad_(False)
    expected = model(ids)[:, -3:]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            logits = read(model, ids)
            samples = choose(expected.reshape(-1, 71), torch.zeros(15, dtype=torch.float32))
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(logits, expected)
        assert samples.tolist() == [0] * 15
    model.blocks.bfloat16()
    exact = GPT(model.config).eval()
    exact.load_state_dict(model.state_dict())
    torch.testing.assert_close(read(model, ids), exact(ids)[:, -3:])
    model.positions.mul_(2)
    exact.positions.mul_(2)
    torch.testing.assert_close(read(model, ids), exact(ids)[:, -3:])


@needs_compiler
def test_ids_of_another_dtype_are_read():
    model = GPT(GPTConfig(71, 80, d_model=64, n_layers=1, n_heads=2, d_ff=64)).eval()
    with torch.inference_mode():
        decoder = Decoder(model, [torch.tensor([1, 2])] * 16, "c")
        assert decoder.read(torch.full((16,), 3, dtype=torch.int32)).isfinite().all()


@needs_compiler
def test_bfloat16_rounds_weights_keys_and_values_and_nothing_else():
    torch.manual_seed(0)
    model = GPT(GPTConfig(71, 80, d_model=64, n_layers=1, n_heads=2, d_ff=64)).eval()
    model.requires_grad_(False)
    ids = torch.randint(0, 71, (3, 3))
    rounded = GPT(model.config).eval()
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    rounded.positions.copy_(model.positions.bfloat16())
    qkv = rounded.blocks[0].attention.qkv

    def round_keys_and_values(module: object, inputs: object, out: torch.Tensor) -> torch.Tensor:
        q, k, v = out.chunk(3, dim=-1)
        return torch.cat([q, k.bfloat16().float(), v.bfloat16().float()], dim=-1)

    qkv.register_forward_hook(round_keys_and_values)
    torch.testing.assert_close(read(model.bfloat16(), ids), rounded(ids))


FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.3},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


@pytest.fixture
def one_thread():
    """One thread: two wait for each other actively, which is slow beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generated(
    backend: Literal["torch", "c"], prompts: list[list[int]], end: int = 0, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (T, B) and logits (T, B, 57)."""
    model = make_model().requires_grad_(False)
    sampling = SamplingConfig(**{"max_tokens": 60, "backend": backend, "seed": 4, **settings})
    steps = list(generate(model, prompts, sampling, end, vocab_size=57))
    ids, logits = (torch.stack(column) for column in zip(*steps, strict=True))
    return ids, logits


@needs_compiler
@pytest.mark.parametrize("name", [*FILTERS, "penalty"])
def test_generated_tokens_equal_those_of_pytorch_for_the_same_seed(name, one_thread):
    """Beyond the context, with sequences that end at different steps."""
    settings = {**FILTERS, "penalty": {"repetition_penalty": 1.5, "top_k": 8}}[name]
    for prompts in ([[5]], [[5, 0, 3], [7], list(range(1, 30))], [[1]] * 9):
        for end in (-1, 9):
            assert_same_tokens(prompts, end, **settings)


@needs_compiler
def test_generated_tokens_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same_tokens([[1]] * 9, 9, **FILTERS["all"])
    finally:
        torch.set_num_threads(before)


def assert_same_tokens(prompts: list[list[int]], end: int, **settings: Any) -> None:
    expected, result = (generated(name, prompts, end, **settings) for name in ("torch", "c"))
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1])


@needs_compiler
def test_streamed_story_equals_that_of_pytorch():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["Once upon a time there was a dragon.", "There was a cat."], 270)
    model = GPT(GPTConfig(tokenizer.vocab_size, 16, d_model=16, n_layers=2, n_heads=2, d_ff=24))
    stories = [
        list(stream_text(model, tokenizer, "Once", SamplingConfig(1.0, seed=2, backend=backend)))
        for backend in ("torch", "c")
    ]
    assert stories[0] == stories[1]
    assert len(stories[0]) > 9


@needs_compiler
def test_structs_and_constants_are_those_of_the_source(tmp_path):
    structs = {name: getattr(decode, f"_{name.title()}") for name in STRUCTS}
    structs["sampler"] = SamplerStruct
    lines = [
        f'#include "{decode.SOURCE}"',
        "const int panel = PANEL, min_sequences = MIN_SEQUENCES;",
    ]
    for name, struct in structs.items():
        lines.append(f"int size_of_{name}(void) {{ return sizeof({name}); }}")
        lines += [
            f"int {name}_{field}(void) {{ return offsetof({name}, {field.rstrip('_')}); }}"
            for field, _ in struct._fields_
        ]
    command, source, path = decode.compiler(), tmp_path / "sizes.c", tmp_path / "sizes.so"
    source.write_text("\n".join(lines), encoding="utf-8")
    subprocess.run([*command, "-w", "-shared", "-fPIC", source, "-lm", "-o", path], check=True)
    compiled = ctypes.CDLL(str(path))
    for name, constant in {"panel": decode.PANEL, "min_sequences": decode._MIN_SEQUENCES}.items():
        assert ctypes.c_int.in_dll(compiled, name).value == constant
    for name, struct in structs.items():
        assert getattr(compiled, f"size_of_{name}")() == ctypes.sizeof(struct)
        for field, _ in struct._fields_:
            offset = getattr(compiled, f"{name}_{field}")()
            assert offset == getattr(struct, field).offset, (name, field)


STRUCTS = ("matrix", "norm", "layer", "model", "batch")


@pytest.mark.long
@needs_compiler
def test_library_is_compiled_once_and_replaced_if_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = decode.compiler()
    assert command
    path = decode._cached_path(command)
    assert [path.name for path in (tmp_path / "minigpt").iterdir()] == [path.name]
    modified = path.stat().st_mtime_ns
    assert decode._cached_path(command) == path
    assert path.stat().st_mtime_ns == modified
    assert decode._cached_path([*command, "-DOTHER"]) != path
    path.write_bytes(b"")  # as after a crash
    assert decode._load(command).sample
    assert path.stat().st_size > 0
    other = Path(tmp_path, "other.c")
    other.write_text(decode.SOURCE.read_text() + "\n")
    monkeypatch.setattr(decode, "SOURCE", other)
    assert decode._cached_path(command) != path


@needs_compiler
def test_compiler_without_openmp_is_used_for_small_batches(tmp_path, monkeypatch):
    """For larger batches PyTorch is faster, because it has more threads."""
    script = tmp_path / "mycc"
    script.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(decode, "_FLAGS", FASTER_BUILD)
    alone = decode._load([str(script)])
    monkeypatch.setattr(decode, "library", lambda: alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = GPT(GPTConfig(71, 80, d_model=64, n_layers=1, n_heads=2, d_ff=64)).eval()
    model.requires_grad_(False)
    for rows, backend, cls in (
        (3, "auto", decode.Batch), (4, "auto", CachedBatch), (4, "c", decode.Batch)
    ):  # fmt: skip
        ids = torch.randint(0, 71, (rows, 9))
        with torch.inference_mode():
            decoder = Decoder(model, list(ids[:, :-1]), backend)
            torch.testing.assert_close(decoder.read(ids[:, -1]), model(ids)[:, -1])
        assert isinstance(decoder.batch, cls)


@pytest.mark.parametrize(
    ("cc", "reason"),
    [
        ("", None),
        ("cc '", "quotation"),
        ("false", "['false', '--version']"),
        ("nowhere/cc", "nowhere/cc"),
    ],
)
def test_missing_compiler_gives_no_library_and_a_broken_one_logs_a_warning(
    cc, reason, monkeypatch, caplog
):
    monkeypatch.setenv("CC", cc)
    assert decode._compiled_library.__wrapped__() is None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (0 if reason is None else 1)
    for message in messages:
        assert "decode.c" in message
        assert reason in message
        assert "\n" not in message


def test_unwritable_cache_logs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "minigpt").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -v" if decode.compiler() else "true")
    assert decode._compiled_library.__wrapped__() is None
    assert "File exists" in caplog.text


# ---------------------------------------------------------------------------- supported models


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_of_a_frozen_model_are_cached_and_freed_with_it(dtype):
    model = make_model().to(dtype).requires_grad_(False)
    prompts = list(random_ids(4, 5))
    with torch.inference_mode():
        first, again = Decoder(model, prompts, "c"), Decoder(model, prompts[:1], "c")
    assert again.batch.weights is first.batch.weights
    reference = weakref.ref(model)
    del model, first, again
    gc.collect()
    assert reference() is None


class Same(GPT):
    """A subclass that overrides nothing."""


def with_part(change) -> GPT:
    model = make_model()
    change(model)
    return model


OTHERS = {
    "a subclass": lambda: make_model(cls=Flipped),
    "a subclass with nothing of its own": lambda: make_model(cls=Same),
    "a replaced forward": lambda: with_part(lambda model: setattr(model, "forward", lambda *_: 0)),
    "a replaced hidden": lambda: with_part(lambda model: setattr(model, "hidden", lambda *_: 0)),
    "a hook": lambda: with_part(
        lambda model: model.blocks[0].register_forward_hook(lambda *_: None)
    ),
    "another activation": lambda: with_part(
        lambda model: setattr(model.blocks[1].feed_forward, "forward", lambda x: x)
    ),
    "a layer less": lambda: with_part(lambda model: model.blocks.__delitem__(1)),
    "another width": lambda: with_part(
        lambda model: setattr(model.blocks[0].feed_forward, "up", torch.nn.Linear(16, 25))
    ),
    "another norm": lambda: with_part(
        lambda model: setattr(model.blocks[0], "norm1", torch.nn.RMSNorm(16))
    ),
}


@needs_compiler
@pytest.mark.parametrize("kind", OTHERS)
def test_unsupported_models_are_refused_by_name_and_left_to_pytorch(kind):
    model = OTHERS[kind]()
    with pytest.raises(UserError, match=naming("backend", type(model).__name__, "torch")) as caught:
        Decoder(model, [], "c")
    assert "\n" not in str(caught.value)
    assert decode.unsupported(model) is not None
    assert decode.unsupported(make_model()) is None


@needs_compiler
def test_model_with_a_replaced_method_is_unsupported(monkeypatch):
    model = make_model()
    monkeypatch.setattr(GPT, "forward", Flipped.forward)
    assert decode.unsupported(model) is not None


@needs_compiler
@pytest.mark.parametrize(("cls", "lines"), [(GPT, 0), (Flipped, 1)])
def test_subclass_falls_back_to_pytorch_with_one_warning(cls, lines, caplog):
    decoder_module._warn_once.cache_clear()
    for _ in range(3):
        decoder = Decoder(make_model(cls=cls), [torch.tensor([1])])
        assert isinstance(decoder.batch, CachedBatch) == bool(lines)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == lines
    assert all("Flipped" in message for message in messages)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_that_fails_its_self_check_is_not_used(dtype, tmp_path, monkeypatch, caplog):
    source = decode.SOURCE.read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.c"
    wrong.write_text(source.replace("if (epilogue == GELU) sum = gelu(sum);", ""), encoding="utf-8")
    assert wrong.read_text(encoding="utf-8") != source
    monkeypatch.setattr(decode, "SOURCE", wrong)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(decode, "_self_checks", {})
    library = decode._load(decode.compiler())
    monkeypatch.setattr(decode, "_compiled_library", lambda: library)
    model, ids = make_model().to(dtype), random_ids(2, 9)
    with torch.inference_mode():
        decoder = Decoder(model, list(ids[:, :-1]))
        assert torch.allclose(decoder.read(ids[:, -1]), model(ids)[:, -1].float(), atol=0.5)
    assert isinstance(decoder.batch, CachedBatch)
    assert decoder_module.c_backend() is None  # nor for sampling
    for _ in range(2):  # the reason stays the same after the first check
        with pytest.raises(UserError, match=naming("backend", "GPT.forward")) as error:
            Decoder(model, list(ids), "c")
        assert "compiler" not in str(error.value)
    (record,) = caplog.records
    assert "decode.c" in record.getMessage()


def test_c_backend_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(decode, "_compiled_library", lambda: None)
    with pytest.raises(UserError, match=naming("backend", "compiler", "torch")) as caught:
        Decoder(make_model(), [torch.tensor([1])], "c")
    assert "\n" not in str(caught.value)
    assert isinstance(Decoder(make_model(), [torch.tensor([1])]).batch, CachedBatch)


def test_c_backend_refuses_unsupported_dtypes():
    with pytest.raises(UserError, match=naming("backend", "torch")):
        Decoder(make_model().double(), [torch.tensor([1])], "c")
