"""Codes as tokens: vocabulary, completions, decoding and code accuracy."""
