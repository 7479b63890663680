"""The sequence model."""
