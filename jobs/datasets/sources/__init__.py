"""Sources of images: one file a source, each a function that yields rows in a fixed order."""
