"""From training events to fitted type models."""
