"""Writers for the export formats, one function per format.

transformers and llama.cpp run a Mini GPT as a GPT-2: `as_gpt2` removes the two differences between
the architectures. All writers in this module except `write_safetensors` store float32 weights.
html.py has the writer of the format html.
"""

from __future__ import annotations

import contextlib
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
from minigpt.data.formats import optional
from minigpt.generation.sampling import SamplingConfig
from minigpt.model import GPT
from minigpt.runs.names import TOKENIZER, WEIGHTS
from minigpt.tokenizer import END_OF_TEXT, Tokenizer

NAMES = {  # name in Mini GPT: names in the GPT-2 of transformers and in GGUF
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


def as_gpt2(model: GPT) -> dict[str, Tensor]:
    """Return weights with which a GPT-2 computes the logits of `model`.

    The position table of a GPT-2 is a weight; this weight is set to the sinusoids. A GPT-2 does not
    scale its embeddings, so the embedding matrix is multiplied by the scale of `model`. The
    embedding matrix is also the output projection, so the final LayerNorm is divided by the scale.
    The logits are the same up to rounding, and exactly the same if the scale is a power of two, as
    for the medium model.

    Args:
        model: a `GPT`, not an instance of a subclass.

    Returns:
        Tensors by parameter name. Names and shapes are still those of Mini GPT.
    """
    weights = {**model.state_dict(), "positions.weight": model.positions}
    weights["embedding.weight"] = weights["embedding.weight"] * model.scale
    for name in ("final_norm.weight", "final_norm.bias"):
        weights[name] = weights[name] / model.scale
    return weights


def renamed(name: str, column: int) -> str:
    """Return the name of a tensor in another format.

    Args:
        name: name in Mini GPT, such as "blocks.0.norm1.bias".
        column: the other format, HF or GGUF.

    Returns:
        The name in the other format.
    """
    return re.sub("|".join(NAMES), lambda match: NAMES[match[0]][column], name)


# ---------------------------------------------------------------------------- Mini GPT


def write_safetensors(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write tokenizer.json, and model.safetensors with the parameter names of `GPT`.

    Args:
        model: the model.
        tokenizer: the tokenizer of the model.
        folder: the output folder.
        dtype: type of all weights in the file.
    """
    _write_weights({name: w.to(dtype) for name, w in model.state_dict().items()}, folder)
    tokenizer.save(folder / TOKENIZER)


def _write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    # `save_file` would make the file readable only for its owner.
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))


# ---------------------------------------------------------------------------- Hugging Face


def write_hf(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers' AutoModelForCausalLM and AutoTokenizer load.

    Args:
        model: a `GPT`, not an instance of a subclass.
        tokenizer: the tokenizer of the model.
        folder: the output folder.
    """
    weights = {}
    for name, weight in as_gpt2(model).items():
        # GPT-2 stores the matrices of a block as (in, out), nn.Linear as (out, in).
        weight = weight.T if name.startswith("blocks.") and weight.dim() == 2 else weight
        weights[renamed(name, HF)] = weight.contiguous()
    _write_weights(weights, folder)
    end = tokenizer.end_of_text
    write_json(folder / "config.json", _hf_config(model, end))
    sampling = {  # Mini GPT's defaults
        "do_sample": True,
        "temperature": SamplingConfig().temperature,
        "top_k": 0,  # all tokens; the default of transformers is 50
        "max_length": model.config.context_length,  # length of the position table
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    }
    write_json(folder / "generation_config.json", sampling)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # No text is encoded as unk_token, but CTranslate2 needs such a token.
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.context_length,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_tokenizer_with_prefix(tokenizer, folder / TOKENIZER)


def _hf_config(model: GPT, end: int) -> dict[str, Any]:
    c = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.context_length,
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.d_ff,
        "activation_function": "gelu",  # exact; the default of GPT-2 is the tanh approximation
        "layer_norm_epsilon": model.final_norm.eps,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop"), c.dropout),
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        "dtype": "float32",
    }


def write_tokenizer_with_prefix(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json that puts END_OF_TEXT before each text, as a special token.

    In training, END_OF_TEXT precedes every story except the first of an epoch. `minigpt generate`
    also puts it before each prompt.

    Args:
        tokenizer: the tokenizer.
        path: the file to write.
    """
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)],
    )
    write_text(path, f"{library.to_str(pretty=True)}\n")


# ---------------------------------------------------------------------------- ONNX


def write_onnx(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model.onnx and tokenizer.json.

    The input is `ids` (batch, length), int64, with any batch size and any length from 1 to the
    context length. The output is `logits` (batch, length, V), float32.

    Args:
        model: a `GPT`, not an instance of a subclass.
        tokenizer: the tokenizer of the model.
        folder: the output folder.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    for module in ("onnx", "onnxscript"):
        optional(module, "ONNX")
    from torch.export import Dim

    context = model.config.context_length
    axes = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=context)}
    logger = logging.getLogger("torch.onnx")
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")  # from torch 2.13 itself
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)  # it warns that torchvision is missing
        program = torch.onnx.export(
            model,
            (torch.zeros(2, min(3, context), dtype=torch.int64),),
            dynamo=True,
            input_names=["ids"],
            output_names=["logits"],
            dynamic_shapes={"ids": axes},
            verbose=False,
        )
    assert program is not None  # always the case with dynamo=True
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # source paths of this machine
    program.save(folder / "model.onnx", external_data=False)
    tokenizer.save(folder / TOKENIZER)


# ---------------------------------------------------------------------------- GGUF


def write_gguf(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model.gguf, a float32 GPT-2 with tokenizer for llama.cpp, and a Modelfile for Ollama.

    llama.cpp approximates GELU with tanh and a float16 lookup table. So the logits of llama.cpp
    differ slightly from those of Mini GPT; docs/sharing.md has the measurement.

    Args:
        model: a `GPT`, not an instance of a subclass.
        tokenizer: the tokenizer of the model.
        folder: the output folder.

    Raises:
        UserError: gguf is not installed.
    """
    gguf = optional("gguf", "GGUF")
    c = model.config
    writer = gguf.GGUFWriter(folder / "model.gguf", "gpt2")
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_layer_norm_eps(model.final_norm.eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokenizer, c.vocab_size, gguf.TokenType)
    for name, weight in as_gpt2(model).items():
        writer.add_tensor(renamed(name, GGUF), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_text(folder / "Modelfile", _modelfile(c.context_length))


def _modelfile(context: int) -> str:
    """Return the Modelfile that makes Ollama import model.gguf and sample as Mini GPT does."""
    parameters = {
        "num_ctx": context,
        "temperature": SamplingConfig().temperature,
        "top_k": 0,  # all tokens
        "top_p": 1,
        "repeat_penalty": 1,
        "stop": f'"{END_OF_TEXT}"',
    }
    lines = ["FROM ./model.gguf", 'TEMPLATE "{{ .Prompt }}"']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join([*lines, ""])


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int, kind: Any) -> None:
    """Add the vocabulary, the merges and the special tokens to a GGUF file.

    The pre-tokenizer "gpt-2" of llama.cpp splits text as the tokenizer of Mini GPT does.
    """
    bpe = json.loads(tokenizer.to_json())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    tokens += [f"<unused{i}>" for i in range(len(tokens), vocab_size)]  # embeddings without a token
    types = [kind.NORMAL] * len(tokens)
    types[tokenizer.vocab_size :] = [kind.UNUSED] * (vocab_size - tokenizer.vocab_size)
    types[tokenizer.end_of_text] = kind.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(True)
