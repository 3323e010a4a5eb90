"""The two Python files that an exported folder carries; they are copied as they stand and import nothing of megarat."""
