"""A small run folder with fixed values, for tests of the code that reads one."""

import json
from pathlib import Path
from typing import Any

HEADER = "step,tokens,train/loss,val/loss,val/perplexity,val/bits_per_byte,tokens_per_second,lr\n"
ROWS = (
    "10,81920,7.5,,,,20000,0.0005\n"
    "20,163840,6.0,5.5,244.69,2.066,21000,0.001\n"
    "30,245760,5.0,,,,22000,0.0005\n"
    "40,327680,4.0,4.2,66.69,1.578,21000,0\n"
)
SUMMARY = {
    "parameters": 1_046_656,
    "non_embedding_parameters": 662_656,
    "tokens": 327_680,
    "steps": 40,
    "seconds": 200.4,
    "status": "finished",
    "val/loss": 4.2,
    "val/perplexity": 66.69,
    "val/bits_per_byte": 1.578,
    "tokens_per_second": 21000.0,
    "precision": "bf16-mixed",
    "device": "cpu",
    "model": "small",
}


def write_run(
    folder: Path, summary: dict[str, Any] | None = SUMMARY, data: str = "text", seed: int = 1
) -> Path:
    """Write a run of 40 steps with two validations; without a summary it counts as killed."""
    folder.mkdir(parents=True)
    config = f"name: {folder.name}\nseed: {seed}\ndata:\n  source: {data}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.csv").write_text(HEADER + ROWS)
    story = {"step": 20, "tokens": 163840, "prompt": "Once", "temperature": 0.8, "text": "Once up"}
    lines = [json.dumps(story | {"step": step}) for step in (20, 40)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
