"""Models of behavior types: of the next event, and given its item."""
