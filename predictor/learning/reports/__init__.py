"""What a version tells people: pictures, model card, tables."""
