"""Passes: Program to Program, one pass a file."""
