"""Corpora, published weights, and everything that a reader of the method does not need.

NAME/prepare.py   makes a corpus
weights/          published models: their networks, and prepare.py, which converts their files
lib/              flags, files, checkpoints, devices, processes, tokenizers, corpora, prompts, chat, views

Imports run in one direction: train.py -> sample.py -> model.py -> data/lib.
"""
