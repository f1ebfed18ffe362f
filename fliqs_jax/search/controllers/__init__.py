"""Controllers: how each preset proposes architectures, and learns."""
