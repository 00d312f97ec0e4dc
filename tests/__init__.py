"""The tests of dsc."""
