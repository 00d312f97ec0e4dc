"""Backends: a planned Program becomes an artifact, one folder a backend."""
