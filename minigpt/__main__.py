"""`python -m minigpt`, which is the command `minigpt`."""

from minigpt.cli.app import main

if __name__ == "__main__":
    main()
