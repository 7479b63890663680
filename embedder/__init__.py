"""Text to vectors and nearest neighbours: the embedder service."""
