"""`python -m dsc` is the `dsc` command."""

from dsc.cli import command

if __name__ == "__main__":
    command()
