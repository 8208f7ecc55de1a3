"""Train a model. Example: `python train.py model=large budget.tokens=20e6`; see `--help`."""

from minigpt.cli.start import run

if __name__ == "__main__":
    run("minigpt.cli.train")
