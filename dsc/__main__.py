"""`python -m dsc` is the `dsc` command."""

from dsc.cli import main

if __name__ == "__main__":
    main()
