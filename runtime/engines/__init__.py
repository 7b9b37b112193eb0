"""Compiled models: the folder of an engine, and the libraries that run one."""
