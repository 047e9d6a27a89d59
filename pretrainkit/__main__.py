"""`python -m pretrainkit COMMAND ...` is `pretrainkit COMMAND ...`."""

from pretrainkit.cli import main

if __name__ == "__main__":
    main()
