"""A package from outside: what it adds to dsc stands in one file."""
