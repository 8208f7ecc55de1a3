"""Compare logits, loss curves of w32 and a run with golden values; `make golden` has the rest."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden import values
from tests.golden.__main__ import LOGITS, VALUES

GOLDEN = json.loads(VALUES.read_text(encoding="utf-8"))
SAME_MACHINE = values.machine() == GOLDEN["machine"]


@pytest.mark.parametrize("name", values.RELEASES)
def test_golden_logits_of_a_release(name: str):
    expected = load_file(LOGITS)
    logits = values.forward_logits(name)
    torch.testing.assert_close(logits[:, ::16], expected[f"{name} forward"], rtol=1e-4, atol=2e-4)
    if SAME_MACHINE and (bits := GOLDEN["bits"].get(f"{name} forward")):
        assert values.digest({"logits": logits}) == bits
    if values.has_c_backend():
        decoded = values.decoded_logits(name)[:, ::4]
        torch.testing.assert_close(decoded, expected[f"{name} C"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_golden_loss_curve_of_w32(optimizer: str, tmp_path: Path):
    expected = GOLDEN["curves"][f"w32 {optimizer}"]
    losses = values.curve("w32", optimizer, tmp_path)
    assert losses == (expected if SAME_MACHINE else pytest.approx(expected, abs=2e-2))


def test_golden_run_is_evaluated_and_resumed(tmp_path: Path):
    expected = GOLDEN["kept run"]
    result = values.evaluated(tmp_path / "evaluated")
    assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-4)
    assert result["story"] == expected["story"]
    bits = values.resumed(tmp_path / "resumed")
    if SAME_MACHINE:
        assert bits == GOLDEN["bits"]["resumed"]
