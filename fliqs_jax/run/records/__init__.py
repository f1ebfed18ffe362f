"""Records that a run writes while it trains."""
