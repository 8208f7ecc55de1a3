"""Compare the golden values with those of this code: `python -m tests.golden`.

Exits with 1 and a line for each value that moved. `--record` writes all values again, and
`--record-releases` those that depend on the released weights.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.core.hardware import cpu_has_bfloat16
from tests.golden import values
from tests.golden.values import CURVES, HERE, RELEASES, digest

VALUES, LOGITS = HERE / "values.json", HERE / "logits.safetensors"


def measure() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All values of this code as plain ones, and a sample of the logits."""
    released, logits = measure_releases()
    found: dict[str, Any] = {"machine": values.machine(), **released, "curves": {}}
    with tempfile.TemporaryDirectory() as folder:
        for size, optimizer in CURVES:
            found["curves"][f"{size} {optimizer}"] = values.curve(size, optimizer, Path(folder))
        if cpu_has_bfloat16():
            found["bfloat16"] = values.curve("w32", "muon", Path(folder), "bf16-mixed")
        found["bits"]["resumed"] = values.resumed(Path(folder) / "resumed")
        found["kept run"] = values.evaluated(Path(folder) / "evaluated")
    found["settings"] = values.settings()
    return found, logits


def measure_releases() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values that depend on the released weights, and a sample of the logits."""
    found: dict[str, Any] = {"stories": {}, "bits": {}}
    logits: dict[str, Tensor] = {}
    for name in RELEASES:
        forward = values.forward_logits(name)
        logits[f"{name} forward"] = forward[:, ::16].clone()
        found["bits"][f"{name} forward"] = digest({"logits": forward})
        if values.has_c_backend():
            logits[f"{name} C"] = values.decoded_logits(name)[:, ::4].clone()
        found["stories"][name] = values.stories(name)
    return found, logits


def record_releases() -> None:
    """Replace the values that depend on the released weights, and keep all others.

    Bits are compared only on the machine that recorded the others; another one removes those of the
    releases.
    """
    golden = json.loads(VALUES.read_text(encoding="utf-8"))
    found, logits = measure_releases()
    golden["stories"] = found["stories"]
    others = {key: bits for key, bits in golden["bits"].items() if key not in found["bits"]}
    same_machine = values.machine() == golden["machine"]
    golden["bits"] = {**(found["bits"] if same_machine else {}), **others}
    write(golden, logits)


def write(golden: dict[str, Any], logits: dict[str, Tensor]) -> None:
    """Write all golden values and the sample of the logits."""
    VALUES.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(logits, LOGITS)


def differences(
    found: dict[str, Any],
    logits: dict[str, Tensor],
    golden: dict[str, Any],
    kept: dict[str, Tensor],
) -> list[str]:
    """A line for each value of `found` that is not the golden one."""
    wrong = []
    for name, expected in kept.items():
        if name in logits and not torch.allclose(logits[name], expected, rtol=1e-4, atol=2e-4):
            wrong.append(f"logits {name}: {(logits[name] - expected).abs().max():.2e} off")
    same_machine = found["machine"] == golden["machine"]
    for name, expected in golden["curves"].items():
        got = found["curves"][name]
        off = max(abs(a - b) for a, b in zip(got, expected, strict=True))
        if off > (0 if same_machine else 2e-2):
            wrong.append(f"curve {name}: {off:.2e} nats off")
    if "bfloat16" in found:
        pairs = zip(found["bfloat16"], golden["curves"]["w32 muon"], strict=True)
        off = max(abs(a - b) for a, b in pairs)
        if off > 5e-2:
            wrong.append(f"curve w32 muon in bfloat16: {off:.2e} nats off float32")
    if same_machine:
        wrong += [f"{name}: other bits" for name, bits in golden["bits"].items()
                  if found["bits"][name] != bits]  # fmt: skip
    for name, expected in golden["kept run"].items():
        got = found["kept run"][name]
        same = (
            got == expected
            if isinstance(expected, str)
            else math.isclose(got, expected, rel_tol=1e-4)
        )
        wrong += [] if same else [f"kept run {name}: {got!r} for {expected!r}"]
    wrong += [f"stories {name}: another text" for name, texts in golden["stories"].items()
              if found["stories"][name] != texts]  # fmt: skip
    for name, expected in golden["settings"].items():
        wrong += _changed(expected, found["settings"][name], f"settings {name or 'train'}")
    return wrong


def _changed(expected: Any, got: Any, where: str) -> list[str]:
    """A line for each key of `expected` that `got` lacks or has another value of."""
    if where.endswith("model.attention"):  # a choice of kernel: not a setting of the model any more
        return []
    if where.endswith("logger.project"):  # None means WANDB_PROJECT, else mini-gpt
        return []
    if where == "settings recipe.data.source":  # today tinystories_sample with data.valid=tuning
        return []
    if not isinstance(expected, dict) or not isinstance(got, dict):
        return [] if expected == got else [f"{where}: {got!r} for {expected!r}"]
    return [
        line
        for key, value in expected.items()
        for line in _changed(value, got.get(key, "nothing"), f"{where}.{key}")
    ]


if __name__ == "__main__":
    if "--record-releases" in sys.argv:
        record_releases()
        sys.exit()
    found, logits = measure()
    if "--record" in sys.argv:
        write(found, logits)
        sys.exit()
    golden = json.loads(VALUES.read_text(encoding="utf-8"))
    wrong = differences(found, logits, golden, load_file(LOGITS))
    print(*wrong, sep="\n")
    print(f"{len(golden['bits']) + len(golden['curves'])} golden values, {len(wrong)} moved")
    sys.exit(bool(wrong))
