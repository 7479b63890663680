"""Text to vectors: the encoder and what runs it, batches across calls, texts seen before."""
