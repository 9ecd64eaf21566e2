"""Modules that every package may import: values over epochs, random numbers by key, atomic and regular files, byte sizes, accuracy."""
