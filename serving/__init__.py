"""What both services share."""
