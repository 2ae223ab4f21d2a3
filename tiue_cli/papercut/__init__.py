"""Papercut, the model that ships: its world, its checker and its weights."""
