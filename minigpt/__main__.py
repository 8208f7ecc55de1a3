"""Run `minigpt` as `python -m minigpt`."""

from minigpt.cli.start import main

if __name__ == "__main__":
    main()
