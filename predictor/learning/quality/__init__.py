"""What is odd about data as they come: found, measured, and dropped where --clean says so."""
