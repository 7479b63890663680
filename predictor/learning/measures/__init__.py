"""How good a version is, beside baselines."""
