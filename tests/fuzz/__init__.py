"""Strangers' files and arguments, made up: see README.md in tests/."""
