"""What is trained on: image listings, splits, transforms and the order of samples."""


class DataError(ValueError):
    """A dataset that cannot be used as it lies; one line that names the file and the mend."""
