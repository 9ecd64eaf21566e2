"""Storage of images: class folders, archives and their index, labels."""
