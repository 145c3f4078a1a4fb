"""Datasets: listings, splits, decoding, transforms and the order of samples."""
