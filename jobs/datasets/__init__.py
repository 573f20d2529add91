"""Sources of pictures: one file a source, each a function that yields `jobs.data.Row`s in a fixed order."""
