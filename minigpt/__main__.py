"""Run `minigpt` as `python -m minigpt`."""

from minigpt.cli.app import main

if __name__ == "__main__":
    main()
