"""Prompts: their syntax, how several are composed, and what the text encoders make of them."""
