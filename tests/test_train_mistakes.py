"""Mistakes in train.py's flags: one sentence and exit code 2."""

import pytest
import torch
from world import mistake, state_of

import sample
import train

pytestmark = pytest.mark.usefixtures("in_world")


TRAIN_MISTAKES = {
    "--eval_only --init_from out/ckpt.pt --level 0.15": "--level 0.15: the bound",
    "--eval_only --init_from out/ckpt.pt --rate spindle:0.3": "--rate spindle:0.3",
    "--eval_only --init_from out/ckpt.pt --rate slant:1 --level grid:4": "--level grid:4: the bound",
    "--eval_only --init_from out/ckpt.pt --prompt_len 0:16": "one number",
    "--rate slant:0": "W > 0",
    "--rate 0.3": "t, slant:W or spindle:W",
    "--data book --rate spindle:0.3 --level uniform --weight elbo": "no bound",
    "--data book --level uniform --weight elbo --visible 0.1": "--visible 0.1",
    "--data book --rate slant:1 --level grid:4 --weight elbo": "--level grid:4: the bound",
    "--data book --method gpt --level uniform": "each token is a hole",
    "--method autoregression": "ar-diffusion",
    "--init_from resume --method mdlm --max_iters 9": "--method mdlm: the run in out/last.pt has default",
    "--nonsense 1": "--nonsense",
    "--max_iter 5": "--max_iter",  # no abbreviations either
    "--batch_size two": "two",
    "--optimizer middle": "muon",
    "--data nope --out_dir new": "ready are: book",
    "--data book --context 1000000 --out_dir new": "fewer than one --context",
    "--level grid:0": "grid:N",
    "--level bell:0": "bell:S",
    "--level 1.5": "1.5",
    "--weight elbo": "--weight mean",  # with the default level, a bell
    "--prompt_len 5:2": "0:64",
    "--prompt_len x": "0:64",
    "--prompt_len 256": "256",
    "--batch_size 6 --grad_accum 4": "--batch_size 6",
    "--n_embd 30 --n_head 4": "--n_head 4",
    "--n_layer 0": "at least 1",
    "--lr 0": "above 0",
    "--lr nan": "above 0, not nan",
    "--max_minutes inf": "above 0, not inf",
    "--seed -1": "at least 0",
    "--dropout 1": "below 1",
    "--max_minutes 0": "above 0",
    "--eval_only": "--init_from",
    "--init_from nope.pt --data book": "No such file",
    "--init_from resume --out_dir nowhere": "No such file",
    "--data book --context 32 --max_iters 1": "--out_dir out: there is a run in it",
    "--init_from out/ckpt.pt --data book --max_iters 1": "--out_dir out: there is a run in it",
    "--init_from resume --data other": "--data other: the run in out/last.pt has book",
    "--init_from out/ckpt.pt --out_dir new --n_layer 3 --data book": "has 1",
    "--init_from resume": "complete",
    "--init_from resume --max_iters 9 --optimizer adamw": "not with these flags",
    "--data book --context 32 --prompt_len 0 --out_dir new --n_layer 10000 --n_embd 8192": "parameters and 256 tokens",
    "--data book --context 32 --prompt_len 0 --out_dir new --batch_size 1000000000": "32,000,000,000 tokens per step",
    "--data book --init_from out/ckpt.pt --out_dir new --batch_size 1000000000": "32,000,000,000 tokens per step",
    "--data book --out_dir book.txt --context 32 --prompt_len 0": "book.txt",
    "--attention block": "block:K for blocks of K tokens",
    "--attention sideways": "none of canvas, shifted, causal, block:K",
    "--attention shifted:4": "or draft:K",
    "--attention block:5 --context 32 --data book": "K must divide --context 32",
    "--attention causal --level uniform --data book": "each token is a hole",
    "--init_from resume --attention causal --max_iters 9": "--attention causal: the run in",
    "--init_from gpt/ckpt.pt --eval_only --level grid:9": "each token is a hole",
    "--data book --context 32 --device cuda:99": "cuda:99",
}


@pytest.mark.parametrize("flags", TRAIN_MISTAKES)
def test_train_mistakes(flags, world, monkeypatch, capsys):
    before = state_of(world)
    assert TRAIN_MISTAKES[flags] in mistake(train.main, flags.split(), monkeypatch, capsys)
    assert state_of(world) == before


@pytest.mark.parametrize("main", [train.main, sample.main])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_a_device_that_is_not_there(main, monkeypatch, capsys):
    assert "--device cuda" in mistake(main, ["--device", "cuda"], monkeypatch, capsys)
