"""Translating many images with Ray Data."""
