"""Search of any JAX program: its products are found and replaced."""
