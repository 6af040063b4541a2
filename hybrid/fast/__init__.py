"""The fast path of one sequence: compiled calls instead of transformers' layers."""
