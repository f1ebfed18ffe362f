"""The served program in files that need no code of this package."""
