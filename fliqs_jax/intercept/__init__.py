"""Interception of linen layers: makes any linen model searchable."""
