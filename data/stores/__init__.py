"""Where images lie: class folders, archives and their index, labels."""
