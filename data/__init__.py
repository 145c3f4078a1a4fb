"""What is trained on: image listings, splits, transforms and the order of samples."""
