"""What is decode.c's own; that it computes what a full pass does is in test_decoding.py."""

import copy
import ctypes
import itertools
import math
import subprocess
from pathlib import Path

import pytest
import torch

from minigpt.generation.decoder import Decoder
from minigpt.generation.sampling import SamplingConfig, sample, seeded_generator
from minigpt.kernels import decode
from minigpt.model import GPT, GPTConfig
from tests.conftest import naming

needs_compiler = pytest.mark.skipif(decode.compiler() is None, reason="no C compiler")


def read(net: GPT, ids: torch.Tensor, threads: int = 1) -> torch.Tensor:
    """Logits of the last 3 tokens of each row of `ids` (B, T)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            decoder = Decoder(net, list(ids[:, :-3]))
            assert isinstance(decoder.batch.weights, decode.NativeWeights)
            return torch.stack([decoder.read(new) for new in ids[:, -3:].unbind(1)], dim=1)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [*range(1, 9), 13, 26])
def test_any_number_of_rows_on_any_number_of_threads_gives_what_a_full_pass_does(rows, dtype):
    torch.manual_seed(0)  # widths that are no multiples of a panel, heads wider than one
    net = GPT(GPTConfig(71, 80, d_model=84, n_layers=2, n_heads=2, d_ff=50)).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, 71, (rows, 40))
    expected = net(ids)[:, -3:]
    net = net.to(dtype)
    near = {} if dtype == torch.float32 else {"rtol": 0, "atol": 0.05 * expected.abs().max()}
    for threads in (1, 2, 3):
        torch.testing.assert_close(read(net, ids, threads), expected, **near)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_layer_that_is_tabulated_gives_what_its_product_does(monkeypatch, dtype):
    torch.manual_seed(0)
    net = GPT(GPTConfig(71, 80, d_model=64, n_layers=2, n_heads=2, d_ff=64)).eval()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    net, ids, found = net.to(dtype).requires_grad_(False), torch.randint(0, 71, (9, 40)), []
    for most in (151 * 3 * 64, 151 * 3 * 64 - 1):
        monkeypatch.setattr(decode, "_MOST_KNOWN", most)
        tabulated = decode.NativeWeights(copy.deepcopy(net).float(), dtype, tabulate=True)
        assert (tabulated.struct.known.tokens is not None) == (most == 151 * 3 * 64)
        found += [read(copy.deepcopy(net), some, threads=2) for some in (ids, ids[:2])]
    # Rounded keys and values make a step in bfloat16 of the last place of a float32.
    near = {} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(found[2:], found[:2], **near)


@needs_compiler
@pytest.mark.parametrize("rows", [3, 26])
def test_rows_of_different_lengths_on_threads_that_divide_nothing_evenly(rows):
    torch.manual_seed(0)
    net = GPT(GPTConfig(71, 80, d_model=82, n_layers=2, n_heads=2, d_ff=50)).eval()
    net.requires_grad_(False)
    texts = [torch.randint(0, 71, (n,)) for n in torch.randint(0, 79, (rows,)).tolist()]
    new = torch.randint(0, 71, (rows,))
    pairs = zip(texts, new, strict=True)
    expected = [net(torch.cat([text, one[None]])[None])[0, -1] for text, one in pairs]
    for threads in (1, 2, 3, 4):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                decoder = Decoder(net, texts)
                torch.testing.assert_close(decoder.read(new), torch.stack(expected))
        finally:
            torch.set_num_threads(before)
        assert isinstance(decoder.batch, decode.NativeBatch)
        for block in decoder.batch._blocks:  # room for what is read behind the last value
            assert block.numel() == 2 * rows * 2 * 82 * decode.PANEL + decode.PANEL


@needs_compiler
def test_vectors_of_avx_512_give_the_same(monkeypatch, tmp_path):
    """Sixteen lanes, which compilers make of smaller ones where the CPU has none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wide = decode._compiled([*decode.compiler(), "-D__AVX512F__", "-Wno-psabi", "-fopenmp"])
    monkeypatch.setattr(decode, "library", lambda: decode._opened(wide))
    torch.manual_seed(0)
    net = GPT(GPTConfig(71, 80, d_model=84, n_layers=2, n_heads=2, d_ff=50)).eval()
    ids = torch.randint(0, 71, (9, 40))
    net.requires_grad_(False)
    expected = net(ids)[:, -3:]
    torch.testing.assert_close(read(net, ids, 2), expected)
    near = 0.05 * float(expected.abs().max())
    torch.testing.assert_close(read(net.bfloat16(), ids, 2), expected, rtol=0, atol=near)
    logits, points = torch.randn(9, 71), torch.rand(9)
    mass = logits.softmax(-1).cumsum(-1)
    assert decode.draw(logits, 1.0, points).tolist() == [
        int(torch.searchsorted(row, point)) for row, point in zip(mass, points, strict=True)
    ]


@needs_compiler
def test_default_dtypes_and_parts_in_another_dtype_change_nothing():
    torch.manual_seed(0)
    net = GPT(GPTConfig(71, 80, d_model=64, n_layers=1, n_heads=2, d_ff=64)).eval()
    ids = torch.randint(0, 71, (5, 9))
    net.requires_grad_(False)
    expected = net(ids)[:, -3:]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = read(net, ids)
            drawn = decode.draw(expected.reshape(-1, 71), 1.0, torch.zeros(15))
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected)
        assert drawn.tolist() == [0] * 15
    net.blocks.bfloat16()
    exact = GPT(net.config).eval()
    exact.load_state_dict(net.state_dict())
    torch.testing.assert_close(read(net, ids), exact(ids)[:, -3:])
    net.positions.mul_(2)
    exact.positions.mul_(2)
    torch.testing.assert_close(read(net, ids), exact(ids)[:, -3:])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_of_any_dtype_are_sampled(dtype):
    logits = torch.full((4, 80), -30.0, dtype=dtype)
    logits[:, 50] = 30.0
    for library in (decode.library, lambda: None):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(decode, "library", library)
            generator = seeded_generator(0, torch.device("cpu"))
            assert sample(logits, SamplingConfig(1.0), generator).tolist() == [50] * 4


@needs_compiler
def test_too_few_ids_are_refused():
    net = GPT(GPTConfig(71, 80, d_model=64, n_layers=1, n_heads=2, d_ff=64)).eval()
    with torch.inference_mode():
        decoder = Decoder(net, [torch.tensor([1, 2])] * 16)
        with pytest.raises(ValueError, match=naming("(1,)", "16")):
            decoder.read(torch.tensor([3]))
        assert decoder.read(torch.full((16,), 3, dtype=torch.int32)).isfinite().all()


@needs_compiler
def test_bfloat16_rounds_weights_keys_and_values_and_nothing_else():
    torch.manual_seed(0)
    net = GPT(GPTConfig(71, 80, d_model=64, n_layers=1, n_heads=2, d_ff=64)).eval()
    net.requires_grad_(False)
    ids = torch.randint(0, 71, (3, 3))
    rounded = GPT(net.config).eval()
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in net.state_dict().items()})
    rounded.positions.copy_(net.positions.bfloat16())
    qkv = rounded.blocks[0].attention.qkv

    def round_keys_and_values(module: object, inputs: object, out: torch.Tensor) -> torch.Tensor:
        q, k, v = out.chunk(3, dim=-1)
        return torch.cat([q, k.bfloat16().float(), v.bfloat16().float()], dim=-1)

    qkv.register_forward_hook(round_keys_and_values)
    torch.testing.assert_close(read(net.bfloat16(), ids), rounded(ids))


@needs_compiler
def test_the_token_drawn_is_that_of_pytorch_for_the_same_random_number(monkeypatch):
    torch.manual_seed(0)
    for n, temperature in itertools.product((1, 7, 8, 33, 3000), (0.3, 1.0, 2.5)):
        logits, drawn = 4 * torch.randn(200, n), []
        logits[:, ::3] -= 100.0  # as good as impossible
        for library in (decode.library, lambda: None):
            with monkeypatch.context() as patched:
                patched.setattr(decode, "library", library)
                generator = seeded_generator(1, torch.device("cpu"))
                drawn.append(sample(logits, SamplingConfig(temperature), generator))
        assert (drawn[0] == drawn[1]).float().mean() >= 0.99  # but where sums are rounded apart
        assert n == 1 or len(drawn[0].unique()) > 1


@needs_compiler
def test_neither_end_of_the_random_numbers_draws_what_cannot_be():
    logits = torch.full((5, 70), -math.inf)
    logits[:, 40:43] = torch.tensor([1.0, 1.0, 0.0])
    points = torch.tensor([0.0, 0.3, 0.5, 0.9, 1 - 2**-24])
    assert decode.draw(logits, 1.0, points).tolist() == [40, 40, 41, 42, 42]
    assert decode.draw(logits[:1], 1.0, torch.ones(1)).tolist() == [42]  # as rounding might have it
    assert 0 <= decode.draw(torch.full((1, 70), math.nan), 1.0, points[:1]).item() < 70


@needs_compiler
def test_structs_and_constants_are_those_of_the_source(tmp_path):
    structs = {name: getattr(decode, f"_{name.title()}") for name in STRUCTS}
    lines = [f'#include "{decode.SOURCE}"', "const int panel = PANEL, own_rows = OWN_ROWS;"]
    for name, struct in structs.items():
        lines.append(f"int size_of_{name}(void) {{ return sizeof({name}); }}")
        lines += [
            f"int {name}_{field}(void) {{ return offsetof({name}, {field.rstrip('_')}); }}"
            for field, _ in struct._fields_
        ]
    command, source, made = decode.compiler(), tmp_path / "sizes.c", tmp_path / "sizes.so"
    source.write_text("\n".join(lines), encoding="utf-8")
    subprocess.run([*command, "-w", "-shared", "-fPIC", source, "-lm", "-o", made], check=True)
    compiled = ctypes.CDLL(str(made))
    for name, constant in {"panel": decode.PANEL, "own_rows": decode._OWN_ROWS}.items():
        assert ctypes.c_int.in_dll(compiled, name).value == constant
    for name, struct in structs.items():
        assert getattr(compiled, f"size_of_{name}")() == ctypes.sizeof(struct)
        for field, _ in struct._fields_:
            offset = getattr(compiled, f"{name}_{field}")()
            assert offset == getattr(struct, field).offset, (name, field)


STRUCTS = ("matrix", "norm", "layer", "known", "model", "batch")


@needs_compiler
def test_it_is_compiled_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = decode.compiler()
    assert command
    made = decode._cached(command)
    assert [path.name for path in (tmp_path / "minigpt").iterdir()] == [made.name]
    written = made.stat().st_mtime_ns
    assert decode._cached(command) == made
    assert made.stat().st_mtime_ns == written
    assert decode._cached([*command, "-DOTHER"]) != made
    made.write_bytes(b"")  # as a disk might leave it
    assert decode._loaded(command).draw
    assert made.stat().st_size > 0
    other = Path(tmp_path, "other.c")
    other.write_text(decode.SOURCE.read_text() + "\n")
    monkeypatch.setattr(decode, "SOURCE", other)
    assert decode._cached(command) != made


@needs_compiler
def test_a_compiler_without_openmp_is_used_for_few_rows(tmp_path, monkeypatch):
    """For many PyTorch has more threads."""
    script = tmp_path / "mycc"
    script.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    alone = decode._loaded([str(script)])
    monkeypatch.setattr(decode, "library", lambda: alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    net = GPT(GPTConfig(71, 80, d_model=64, n_layers=1, n_heads=2, d_ff=64)).eval()
    net.requires_grad_(False)
    for rows in (3, 4):
        ids = torch.randint(0, 71, (rows, 9))
        with torch.inference_mode():
            decoder = Decoder(net, list(ids[:, :-1]))
            torch.testing.assert_close(decoder.read(ids[:, -1]), net(ids)[:, -1])
        assert isinstance(decoder.batch.weights, decode.NativeWeights) == (rows == 3)


@pytest.mark.parametrize(
    ("cc", "said"),
    [
        ("", None),
        ("cc '", "quotation"),
        ("false", "['false', '--version']"),
        ("nowhere/cc", "nowhere/cc"),
    ],
)
def test_without_a_compiler_pytorch_decodes_and_a_broken_one_is_told_of(
    cc, said, monkeypatch, caplog
):
    monkeypatch.setenv("CC", cc)
    assert decode.library.__wrapped__() is None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (0 if said is None else 1)
    for message in messages:
        assert "decode.c" in message
        assert said in message
        assert "\n" not in message


def test_a_cache_that_cannot_be_written_is_told_of(tmp_path, monkeypatch, caplog):
    (tmp_path / "minigpt").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -v" if decode.compiler() else "true")
    assert decode.library.__wrapped__() is None
    assert "File exists" in caplog.text
