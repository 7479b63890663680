"""Histories, models and predictions: the predictor service."""
