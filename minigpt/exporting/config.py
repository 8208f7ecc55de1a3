"""What to export, and as what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from minigpt.core.fields import documented
from minigpt.core.settings import UserError


@documented
@dataclass(frozen=True)
class ExportConfig:
    """What to write."""

    format: Literal["hf", "safetensors", "onnx", "gguf"] = "hf"
    """Format of the files: of transformers, of this project, ONNX, or of llama.cpp."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights; None means bfloat16 for safetensors, else float32."""

    evaluate: bool = False
    """Whether to evaluate the exported weights if no evaluation of them is there."""

    license: str | None = None
    """License of the weights as the Hub spells it, such as mit; None leaves it to the data."""

    average: bool = False
    """Whether to export the mean of the weights and of those that the run began with."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[\w.-]+", self.license):
            raise UserError(
                "not spelled as on the Hub: mit, cc-by-4.0, ...", "license", self.license
            )
        if self.dtype == "bfloat16" and self.format != "safetensors":
            message = f"{self.format} is written in float32, which is exact: leave this out, or"
            raise UserError(message, "dtype", self.dtype, {"format": "safetensors"})

    @property
    def weights(self) -> str:
        """Type of the exported weights."""
        return self.dtype or ("bfloat16" if self.format == "safetensors" else "float32")
