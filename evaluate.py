"""Evaluate a model, such as `python evaluate.py ckpt=runs/<name>`; see `--help`."""

from minigpt.cli.evaluate import main

if __name__ == "__main__":
    main()
