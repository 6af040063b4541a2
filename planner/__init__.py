"""Pure decisions: which expert runs where, what to copy, what to keep.

Standard library and numpy only; no framework, no clock, no randomness of its own.
"""
