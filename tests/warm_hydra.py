"""Compose settings once, so that processes forked afterwards do it several times faster."""

from minigpt.cli.compose import load_config

load_config("train", ["seed=2"])
load_config("evaluate")
