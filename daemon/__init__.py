"""Rank 0's job life and every rank's entry. The only package that imports pika."""

__version__ = "0.1.0"
