"""From training events to a fitted sequence model."""
