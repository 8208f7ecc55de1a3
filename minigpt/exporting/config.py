"""Settings of an export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from minigpt.core.fields import documented
from minigpt.core.settings import UserError, check, make_tuples

BFLOAT16 = ("safetensors", "html")  # formats that can store bfloat16 weights, and do by default


@documented
@dataclass(frozen=True)
class ExportConfig:
    """Settings of an export.

    Raises:
        UserError: the license is not a valid identifier, or the format does not support the dtype.
    """

    format: Literal["hf", "safetensors", "onnx", "gguf", "html"] = "hf"
    """File format: transformers (hf), Mini GPT (safetensors), ONNX (onnx), llama.cpp (gguf), or a
    page that runs in a browser (html)."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights; None means bfloat16 for safetensors and html, otherwise float32."""

    evaluate: bool = False
    """Whether to evaluate the exported weights if they have not been evaluated yet."""

    license: str | None = None
    """License of the weights, as an identifier of the Hugging Face Hub. None means mit for a model
    that was trained only on TinyStories; for other models, the license is left unspecified."""

    average: tuple[str, ...] = ()
    """Paths of runs to average with the exported run, weight by weight. Each of them must be the
    parent of the exported run, or another run with this parent. The parent is the run that the
    exported run was initialised from."""

    def __post_init__(self) -> None:
        make_tuples(self, "average")
        license = "must be a license identifier of the Hub, such as mit or cc-by-4.0"
        check(self, license, lambda text: bool(re.fullmatch(r"[\w.-]+", text)), "license")
        if self.dtype == "bfloat16" and self.format not in BFLOAT16:
            message = f"the format {self.format} supports only float32"
            raise UserError(message, "dtype", self.dtype, {"format": "safetensors"})

    @property
    def weights(self) -> str:
        """Type of the exported weights: `dtype`, or the format's default if `dtype` is None."""
        return self.dtype or ("bfloat16" if self.format in BFLOAT16 else "float32")
