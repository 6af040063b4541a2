"""How long things take: compute, copies, the terms of a step."""
