"""What the commands have left below a folder: listed, compared, removed."""
