"""Names of the files in a run folder."""

from __future__ import annotations

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.csv"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
# Files of a study of the snapshots.
OVER_TIME_TABLE, OVER_TIME_FIGURE = "over-time.md", "over-time.png"
OVER_TIME_ANIMATION = "embeddings.html"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"  # folder of event files
SNAPSHOTS = "snapshots"  # snapshots/step-000000.safetensors, ...: bfloat16 weights
WEIGHTS = "model.safetensors"  # in an export, instead of a checkpoint
BEST, LAST = "best", "last"  # checkpoints/best.ckpt, last.ckpt; older ones: last-1.ckpt, ...
