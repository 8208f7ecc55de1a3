"""Train a model, such as `python train.py model=large budget.tokens=20e6`; see `--help`."""

from minigpt.cli.train import main

if __name__ == "__main__":
    main()
