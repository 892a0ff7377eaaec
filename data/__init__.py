"""Corpora, published weights, and everything that a reader of the method does not need; README.md lists it."""
