"""Measurements and demonstrations, each a script that names its configuration."""
