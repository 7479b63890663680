"""Vectors of one collection in memory, and their nearest neighbours."""
