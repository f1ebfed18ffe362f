"""The search space: rules, decisions, sizes, and what they cost."""
