"""What a person looks at: pages, charts, grids, tables; dicts in, one HTML file out."""
