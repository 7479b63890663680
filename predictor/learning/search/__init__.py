"""Search of the settings with which a model is fitted, measured by cross-validation."""
