"""What a corpus and a token are, and what every command needs.

corpus.py, tokenizer.py    text as token ids in files, and back
python/, shakespeare/, text/, wikitext2/, wikitext103/, hmm/    corpora, each with a prepare.py
roberta/, gpt2/            RoBERTa's, BERT's and GPT-2's weights as checkpoints
hub.py                     what these two share: the files in which such models are published
canvas/                    a prompt as a canvas; a canvas in the terminal, as a page, as a picture
run/                       flags, files, checkpoints, machines, mistakes, and the state of a training run

Imports run one way: train.py, sample.py, model.py, data/, and in data/ to data/run/ last.
"""
