"""Corpora, published weights, and everything that a reader of the method does not need.

NAME/prepare.py   makes a corpus, or a checkpoint of published weights
weights/          the networks of published models, and the files that they come in
lib/              flags, files, checkpoints, devices, processes, tokenizers, corpora, prompts, chat, views

Imports run in one direction: train.py -> sample.py -> model.py -> data/lib.
"""
