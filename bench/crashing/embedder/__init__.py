"""The embedder as the subject of a campaign."""
