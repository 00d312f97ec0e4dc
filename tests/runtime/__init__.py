"""Tests of what runs artifacts."""
