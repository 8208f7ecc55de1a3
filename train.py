"""Train a Mini GPT: `python train.py model=large budget.tokens=20e6`. See `--help`."""

from minigpt.cli.train import main

if __name__ == "__main__":
    main()
