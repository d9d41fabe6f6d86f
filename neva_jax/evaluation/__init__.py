"""Tasks and scorers, and the sheets that show their answers."""
