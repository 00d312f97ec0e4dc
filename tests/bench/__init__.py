"""Tests of the benchmarks' protocol; figures are taken by hand on a quiet machine."""
