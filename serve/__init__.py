"""The endpoint: a checkpoint behind HTTP, on Ray Serve, with a page to try it."""
