"""Search space: rules, decisions, sizes, and their costs."""
