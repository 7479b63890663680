"""The ranker: candidates, features, trees."""
