"""The demo: from data to predictions and a report, through the services' public interfaces."""
