"""The predictor as the subject of a campaign."""
