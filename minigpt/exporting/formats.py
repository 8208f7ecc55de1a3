"""One writer for each format that `minigpt export` knows: a model into the files of that format.

Other programs know this architecture as GPT-2, with two differences, which `as_gpt2` removes
without changing what the model computes. Every writer leaves float32 but `write_safetensors`.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save
from tokenizers import processors
from torch import Tensor

from minigpt.core.files import write_json, write_text
from minigpt.core.settings import UserError
from minigpt.generation.sampling import SamplingConfig
from minigpt.model import GPT
from minigpt.runs.names import TOKENIZER, WEIGHTS
from minigpt.tokenizer import END_OF_TEXT, Tokenizer

NAMES = {  # ours: what transformers' GPT-2 and GGUF call it
    "embedding": ("transformer.wte", "token_embd"),
    "positions": ("transformer.wpe", "position_embd"),
    "final_norm": ("transformer.ln_f", "output_norm"),
    "blocks": ("transformer.h", "blk"),
    "norm1": ("ln_1", "attn_norm"),
    "attention.qkv": ("attn.c_attn", "attn_qkv"),
    "attention.out": ("attn.c_proj", "attn_output"),
    "norm2": ("ln_2", "ffn_norm"),
    "feed_forward.up": ("mlp.c_fc", "ffn_up"),
    "feed_forward.down": ("mlp.c_proj", "ffn_down"),
}
HF, GGUF = range(2)  # columns of NAMES


def as_gpt2(net: GPT) -> dict[str, Tensor]:
    """Return the weights of the GPT-2 that computes the same logits, under our names.

    GPT-2 has a table of positions, which holds the sinusoids; and it adds an embedding that is not
    scaled, though output and embedding are one matrix here as there. So that matrix takes the
    scale, and the final norm, whose result it multiplies, the inverse: the products are the same
    up to rounding, and exactly where the scale is a power of two (the medium size).
    """
    weights = {**net.state_dict(), "positions.weight": net.positions}
    weights["embedding.weight"] = weights["embedding.weight"] * net.scale
    for name in ("final_norm.weight", "final_norm.bias"):
        weights[name] = weights[name] / net.scale
    return weights


def renamed(name: str, column: int) -> str:
    """Return one of our names, such as blocks.0.norm1.bias, in the words of another program."""
    return re.sub("|".join(NAMES), lambda match: NAMES[match[0]][column], name)


# ---------------------------------------------------------------------------- ours


def write_safetensors(net: GPT, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write model.safetensors with our own names, every weight in `dtype`; tokenizer.json."""
    _write_weights({name: w.to(dtype) for name, w in net.state_dict().items()}, folder)
    tokenizer.save(folder / TOKENIZER)


def _write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    # Not save_file, whose file nobody else may read.
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))


# ---------------------------------------------------------------------------- Hugging Face


def write_hf(net: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """What transformers' AutoModelForCausalLM and AutoTokenizer load."""
    weights = {}
    for name, weight in as_gpt2(net).items():
        # GPT-2 keeps the matrices of a layer as (in, out), nn.Linear as (out, in).
        weight = weight.T if name.startswith("blocks.") and weight.dim() == 2 else weight
        weights[renamed(name, HF)] = weight.contiguous()
    _write_weights(weights, folder)
    end = tokenizer.end_of_text
    write_json(folder / "config.json", _hf_config(net, end))
    sampling = {  # our default
        "do_sample": True,
        "temperature": SamplingConfig().temperature,
        "top_k": 0,  # all tokens: transformers would take the 50 most likely
        "max_length": net.config.context_length,  # of the table of positions
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    }
    write_json(folder / "generation_config.json", sampling)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": net.config.context_length,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_tokenizer_with_prefix(tokenizer, folder / TOKENIZER)


def _hf_config(net: GPT, end: int) -> dict[str, Any]:
    c = net.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.context_length,
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.d_ff,
        "activation_function": "gelu",  # the exact one: GPT-2's own is an approximation by tanh
        "layer_norm_epsilon": net.final_norm.eps,
        "embd_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }


def write_tokenizer_with_prefix(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json that puts END_OF_TEXT in front of a text unless told not to.

    Every story began after one in training, and `minigpt generate` puts one there as well.
    """
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)],
    )
    write_text(path, f"{library.to_str(pretty=True)}\n")


# ---------------------------------------------------------------------------- ONNX


def write_onnx(net: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """model.onnx: `ids` (batch, length) int64 in, `logits` (batch, length, V) float32 out.

    Any batch, and any length from 1 to the context.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    _installed("onnx")
    _installed("onnxscript")
    from torch.export import Dim

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    context = net.config.context_length
    axes = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=context)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")  # of torch 2.13 itself
        program = torch.onnx.export(
            net,
            (torch.zeros(2, min(3, context), dtype=torch.int64),),
            dynamo=True,
            input_names=["ids"],
            output_names=["logits"],
            dynamic_shapes={"ids": axes},
            verbose=False,
        )
    assert program is not None  # with dynamo it is not
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where on this machine the source of each step lies
    program.save(folder / "model.onnx", external_data=False)
    tokenizer.save(folder / TOKENIZER)


# ---------------------------------------------------------------------------- GGUF


def write_gguf(net: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """model.gguf: what llama.cpp reads, as its GPT-2, float32.

    llama.cpp approximates GELU by tanh, and looks it up in a table of half precision: its logits
    are near ours, not equal to them (docs/sharing.md has the difference).

    Raises:
        UserError: gguf is not installed.
    """
    gguf = _installed("gguf")
    c = net.config
    writer = gguf.GGUFWriter(folder / "model.gguf", "gpt2")
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_layer_norm_eps(net.final_norm.eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokenizer, c.vocab_size, gguf.TokenType)
    for name, weight in as_gpt2(net).items():
        writer.add_tensor(renamed(name, GGUF), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int, kind: Any) -> None:
    """Vocabulary and merges; `gpt-2` names the cutting into words that ours does too."""
    model = json.loads(tokenizer.to_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens += [f"<unused{i}>" for i in range(len(tokens), vocab_size)]  # the matrix has their rows
    types = [kind.NORMAL] * len(tokens)
    types[tokenizer.vocab_size :] = [kind.UNUSED] * (vocab_size - tokenizer.vocab_size)
    types[tokenizer.end_of_text] = kind.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(True)


def _installed(package: str) -> Any:
    """Import a package and return it; raise UserError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"this needs the package {package}: type pip install {package}") from None
