"""Adversarial Backdoor Defense for CLIP: losses, generator, attack and defence stages behind the book's notebooks."""

__version__ = "0.1.0"
