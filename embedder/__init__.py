"""The service that owns text -> vector and the FAISS indexes."""
