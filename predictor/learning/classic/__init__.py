"""Classic models on text vectors, by well-kept libraries: to compare with, and to explain."""
