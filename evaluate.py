"""Evaluate a model. Example: `python evaluate.py ckpt=runs/<name>`; see `--help`."""

from minigpt.cli.start import run

if __name__ == "__main__":
    run("minigpt.cli.evaluate")
