"""The data-set format: written from sources of images, read, cached, scanned."""
