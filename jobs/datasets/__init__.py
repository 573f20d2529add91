"""The data-set format: written from sources of pictures, read, cached, scanned."""
