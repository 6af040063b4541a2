"""Before a run: which machine it is about, what would lie where, and how fast it would be."""
