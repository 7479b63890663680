"""Client of foretell: predict what a user will do next."""
