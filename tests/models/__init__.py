"""Tests of the exportable models."""
