"""Expected demand per item or category for coming periods, for stock planning."""
