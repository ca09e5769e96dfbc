"""What test files share: tiny runs, records and datasets, and processes to start and to stop."""
