"""Measure a trained Mini GPT: `python evaluate.py ckpt=runs/<name>`. See `--help`."""

from minigpt.cli.evaluate import main

if __name__ == "__main__":
    main()
