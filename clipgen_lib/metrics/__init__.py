"""What evaluation measures: feature networks, distances, captions, the oracle, classifiers and their report."""
