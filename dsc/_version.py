"""The version of dsc, apart from everything else so that packaging can read it as text."""

__version__ = "0.1.0"
