"""The `dsc` command: one file per verb."""
