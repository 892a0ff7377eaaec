"""Real published weights against figures that transformers 5.24 gave for the same files, in float32.

Each test needs real files, and is skipped unless an environment variable names them: SETITEM_SMOLLM2 is a folder with
SmolLM2-135M-Instruct, its weights rounded to four bits, SETITEM_MINILM one with all-MiniLM-L6-v2, and
SETITEM_SENTENCEPIECE a file of sentencepiece's byte pairs, such as Llama 2's or Mistral 7B's tokenizer.model.
"""

import os
import re

import pytest
import torch
import torch.nn.functional as F
from model_files import library_text
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence

import sample
from data.lib.chat import Chat
from data.weights import hub
from model import load_checkpoint
from sample import denoise

TEXT = (
    "Once upon a time there were 3 little pigs, and the youngest of them lived in a house made of straw. "
    'One day a wolf came by. He said: "Little pig, little pig, let me come in."\n'
)
SMOLLM2_IDS = [6403, 1980, 253, 655, 665, 592, 216, 35, 1838, 14668, 28, 284, 260, 20556, 282, 601, 4161, 281, 253]
SMOLLM2_IDS += [2291, 1135, 282, 11363, 30, 1963, 1194, 253, 14600, 2422, 411, 30, 909, 1137, 42, 476, 24401]
SMOLLM2_IDS += [6342, 28, 1838, 6342, 28, 1303, 549, 1690, 281, 1270, 198]
COLUMNS = [0, 2, 28, 198, 253, 1042, 20000, 49151]
SMOLLM2_LOGITS = {  # at some positions, of these tokens
    0: [13.48003, 6.36005, 22.35274, 21.26353, 19.15259, 10.37871, 8.8146, 0.97229],
    1: [23.15768, 20.63121, 32.20337, 31.05599, 32.21602, 24.10801, 18.91278, 16.89174],
    10: [4.02103, -1.92588, 14.9271, 11.3379, 10.26687, 3.993, -1.78305, -6.10478],
    20: [13.11999, 8.38944, 23.88641, 18.21725, 19.67779, 9.98397, 0.84479, 3.8826],
    46: [2.61133, 9.57856, 7.58483, 16.55801, 6.85927, 1.22004, -1.51399, -7.12292],
}
GREEDY = [28, 260, 905, 436, 10832, 411, 253, 1036, 617, 436, 1343, 347, 260, 476, 67, 369, 259, 29, 50, 350, 18, 355]
GREEDY += [476, 67, 369, 259, 29, 50, 350, 494, 18, 281, 12428, 30, 669, 1036, 436, 1137, 288, 325]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2]
CHAT += [198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]
KING = [101, 2320, 2588, 1037, 2051, 2045, 2001, 1037, 2332, 1012, 102]  # Once upon a time there was a king.
KING_VECTORS = {  # the first channels of the last layer at some positions
    0: [-0.07493, 0.12401, -0.21355, 0.20449],
    3: [-0.33074, 0.28298, -0.15489, 0.38382],
    9: [0.06794, 0.53866, -0.31587, 0.66337],
}


def real(name, run, folder):
    """The checkpoint of a real model."""
    if name not in os.environ:
        pytest.skip(f"{name} names no folder of real weights")
    run(os.environ[name], "--out", folder / "real.pt")
    return folder / "real.pt"


@pytest.fixture
def smollm2(run, tmp_path):
    return real("SETITEM_SMOLLM2", run, tmp_path)


@torch.no_grad()
def test_smollm2_s_logits_and_likelihood_are_the_reference_s(smollm2):
    model, tokenizer, _ = load_checkpoint(smollm2)
    assert tokenizer.encode(TEXT) == SMOLLM2_IDS
    ids = torch.tensor([SMOLLM2_IDS])
    logits = model(ids)[0]
    for place, expected in SMOLLM2_LOGITS.items():
        assert (logits[place, COLUMNS] - torch.tensor(expected)).abs().max() < 1e-4
    nats = F.cross_entropy(logits, ids[0], reduction="sum") / len(TEXT.encode())
    assert f"{nats:.4f}" == "0.7452"


def test_smollm2_s_greedy_text_is_the_reference_s(smollm2):
    model, tokenizer, _ = load_checkpoint(smollm2)
    ids = tokenizer.encode("Once upon a time")
    *_, canvas = denoise(model, torch.tensor([ids + [model.config.mask_id] * 40]), order="left", temperature=0)
    assert canvas[0, len(ids) :].tolist() == GREEDY


def test_smollm2_answers_as_the_reference_does(smollm2):
    model, tokenizer, checkpoint = load_checkpoint(smollm2)
    prompt = Chat(checkpoint["chat"], tokenizer).prompt(QUESTION)
    assert [model.config.shift_id, *prompt] == CHAT
    *_, canvas = denoise(model, torch.tensor([prompt + [model.config.mask_id] * 8]), order="left", temperature=0)
    assert canvas[0, len(prompt) :].tolist() == ANSWER
    assert ANSWER[-1] in model.config.end_ids


def test_smollm2_s_score_is_its_likelihood(smollm2, run, tmp_path, capsys):
    """The score leaves out the special tokens, which have less than 1e-5 of the probability."""
    (tmp_path / "text.txt").write_text(TEXT)
    capsys.readouterr()
    run("--ckpt", smollm2, "--score", tmp_path / "text.txt", "--dtype", "float32", main=sample.main)
    assert capsys.readouterr().out.startswith(f"{0.7452127 * len(TEXT.encode()) / len(SMOLLM2_IDS):.4f} nats per token")


@torch.no_grad()
def test_minilm_s_tokens_and_vectors_are_the_reference_s(run, tmp_path):
    model, tokenizer, _ = load_checkpoint(real("SETITEM_MINILM", run, tmp_path))
    assert tokenizer.encode_line("Once upon a time there was a king.\n") == KING
    ids = torch.tensor([KING])
    vectors = model.run(ids, ids[:, :0], torch.arange(0), len(KING))[0]
    for place, expected in KING_VECTORS.items():
        assert (vectors[place, :4] - torch.tensor(expected)).abs().max() < 1e-4


def test_sentencepiece_s_tokens_are_those_of_both_references(mixed_lines, tmp_path):
    """Those of `tokenizers`, and those of sentencepiece itself for texts without two spaces side by side.

    Mistral's runs of spaces all have one score, so sentencepiece joins them from the left, but `tokenizers` by id.
    """
    if "SETITEM_SENTENCEPIECE" not in os.environ:
        pytest.skip("SETITEM_SENTENCEPIECE names no tokenizer.model")
    sentencepiece = pytest.importorskip("sentencepiece").SentencePieceProcessor(os.environ["SETITEM_SENTENCEPIECE"])
    n = sentencepiece.vocab_size()
    vocab = {sentencepiece.id_to_piece(i): i for i in range(n)}
    merges = [(name[:i], name[i:]) for name in vocab for i in range(1, len(name)) if not name.startswith("<0x")]
    merges = [pair for pair in merges if {*pair} <= vocab.keys()]
    merges.sort(key=lambda pair: -sentencepiece.get_score(vocab["".join(pair)]))
    tokenizers = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizers.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    tokenizers.save(str(tmp_path / "tokenizer.json"))
    text, special, pattern, form = hub.read_tokenizer_json(tmp_path)
    ours = hub.bpe_tokenizer(tmp_path, text, special | {"<mask>": n}, n + 1, pattern, form)
    for line in [library_text()[:500_000], *mixed_lines]:
        assert ours.encode(line) == tokenizers.encode(line).ids, line[:100]
        assert ours.decode(ours.encode(line)) == line.replace("▁", " ")
        single = re.sub(" +", " ", line.replace("▁", "")).strip(" ")
        assert ours.encode(single) == sentencepiece.encode(single), single[:100]
