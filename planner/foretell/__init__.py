"""What will happen: memory fit, simulation, dry run, advice, reports."""
