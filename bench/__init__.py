"""One module per measured claim: `python -m bench.NAME`, the figures as JSON in the last line."""
