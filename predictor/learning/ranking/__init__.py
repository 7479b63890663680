"""From training events to a fitted ranker."""
