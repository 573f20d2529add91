"""Translating many pictures with Ray Data."""
