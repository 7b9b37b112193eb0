"""Faster or smaller: each changes a loaded model in place and keeps what it computes."""
