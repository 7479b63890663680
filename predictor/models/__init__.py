"""What training writes and serving reads: histories, models, the version directory."""
