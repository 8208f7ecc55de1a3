"""What lies in a run folder, under which name."""

from __future__ import annotations

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.csv"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"  # in place of checkpoints, in what `minigpt export` makes
BEST, LAST = "best", "last"  # checkpoints/best.ckpt, last.ckpt; before it last-1.ckpt, ...
