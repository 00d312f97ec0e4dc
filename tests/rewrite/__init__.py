"""Tests of the rewriting machinery."""
