"""Reports: what suites and runs have found, as tables, figures and one HTML page."""
