"""Makes linen models that were not written for this searchable."""
