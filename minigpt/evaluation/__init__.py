"""Evaluation: loss in perplexity and bits per byte, generated stories and embedding probes."""

from minigpt.evaluation.config import EvaluationConfig, StoriesConfig
from minigpt.evaluation.evaluator import evaluate
from minigpt.evaluation.loss import evaluate_loss

__all__ = ["EvaluationConfig", "StoriesConfig", "evaluate", "evaluate_loss"]
