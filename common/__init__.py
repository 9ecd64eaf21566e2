"""Modules that every package may import: values over epochs, random numbers by key, atomic files, byte sizes, accuracy."""
