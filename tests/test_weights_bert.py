"""RoBERTa and BERT: the same logits and tokens as transformers', which is the reference, and back."""

import http.server
import json
import math
import os
import pickle
import random
import re
import shutil
import threading
import time
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from model_files import (
    CLASSES,
    FIRST,
    LETTERS,
    PROTEINS,
    ROOT,
    assert_equal,
    edit,
    library_text,
    renamed,
    same_vocabulary,
    save_weights,
    shape,
    without,
    write_bert,
    write_bpe,
    write_roberta,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import tiny_model

import data.lib.checkpoint
import data.lib.corpus
import data.roberta.prepare as prepare
import data.weights.hub
import data.wikitext2.prepare as wikitext_prepare
import sample
import train
from data.lib.checkpoint import FAMILIES, published_network, save_checkpoint
from data.lib.corpus import load_corpus
from data.lib.errors import Mistake
from data.lib.tokenizer import ByteTokenizer
from data.weights.hub import bpe_files, read_bpe
from model import ModelConfig, Transformer, load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")


@pytest.fixture(scope="session")
def expected(originals):
    """Our tensors of the small RoBERTa."""
    folder, reference = originals["roberta"]
    return in_memory(folder, reference.state_dict()).state_dict()


def in_memory(folder, tensors):
    """Our model of a folder's config.json and vocabulary, and of their tensors."""
    theirs = prepare.read_config(folder / "config.json")
    tokenizer = prepare.read_tokenizer(folder, theirs)
    return prepare.convert(theirs, tokenizer, folder / "pytorch_model.bin", tensors)[0]


@torch.no_grad()
def difference(model, reference, ids):
    """The largest between the logits of two models at ids (B, T), wherever and of whatever but masks."""
    mask = model.config.mask_id
    ours = model(ids)  # (B, T, V)
    theirs = reference(ids).logits
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert (ours[..., mask] == -torch.inf).all()
    text = torch.arange(ours.shape[-1]) != mask
    return (ours - theirs)[..., text].abs().max().item()


def random_ids(config, B, T):
    """(B, T) of all tokens but the padding."""
    ids = torch.randint(config.vocab_size - 1, (B, T))
    return ids + (ids >= config.pad_token_id)


def largest_difference(model, reference, lengths):
    torch.manual_seed(0)
    return max(difference(model, reference, random_ids(reference.config, 3, T)) for T in lengths)


REAL = {  # but for the vocabulary: kind, shape, lengths
    "distilroberta": ("roberta", shape(768, 6, 12, 3072, 514), (2, 17, 512)),
    "roberta-base": ("roberta", shape(768, 12, 12, 3072, 514), (2, 65, 512)),
    "roberta-large": ("roberta", shape(1024, 24, 16, 4096, 514), (2, 512)),
    "bert-base": ("bert", shape(768, 12, 12, 3072, 512), (2, 65)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_logits_of_the_real_shapes_are_those_of_the_reference(name, merges, tmp_path):
    kind, settings, lengths = REAL[name]
    if kind == "roberta":
        reference = write_roberta(tmp_path / name, merges[:40], **settings)
    else:
        reference = write_bert(tmp_path / name, **settings)
    model = in_memory(tmp_path / name, reference.state_dict())
    largest = largest_difference(model, reference, lengths)
    print(f"{name}: the largest difference is {largest:.1e}")
    assert model.config.context == 512
    assert largest < 1e-4


ODD = {
    "roberta: pad 0, relu, a large eps, 3 types": {
        **shape(36, 3, 3, 50, 31),
        "first": ("<pad>", "<s>", "</s>", "<unk>"),
        "hidden_act": "relu",
        "layer_norm_eps": 1e-2,
        "type_vocab_size": 3,
    },
    "roberta: pad 3, gelu_new, untied, narrow inside": {
        **shape(80, 2, 5, 24, 26),
        "first": ("<s>", "</s>", "<unk>", "<pad>"),
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "roberta: pad 5, silu, one head, one layer, one type": {
        **shape(20, 1, 1, 48, 40),
        "first": ("</s>", "<unk>", "<s>", "madeupword0000", "madeupword0001", "<pad>"),
        "hidden_act": "silu",
        "type_vocab_size": 1,
    },
    "bert: pad 1, relu, untied, 3 types": {
        **shape(36, 2, 3, 48, 26),
        "tokens": ["[UNK]", "[PAD]", *PROTEINS[2:]],
        "hidden_act": "relu",
        "type_vocab_size": 3,
        "tie_word_embeddings": False,
    },
    "bert: gelu_new, a large eps, one layer": {
        **shape(48, 1, 6, 100, 33),
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-2,
    },
}


@pytest.mark.parametrize("name", ODD)
def test_logits_of_odd_shapes_are_those_of_the_reference_at_every_length(name, merges, tmp_path):
    if name.startswith("roberta"):
        reference = write_roberta(tmp_path / "odd", merges[:20], **ODD[name])
    else:
        reference = write_bert(tmp_path / "odd", **ODD[name])
    model = in_memory(tmp_path / "odd", reference.state_dict())
    lengths = range(2, model.config.context + 1)
    largest = largest_difference(model, reference, lengths)
    print(f"{name}: the largest difference is {largest:.1e}")
    unused = reference.config.pad_token_id + 1 if name.startswith("roberta") else 0
    assert model.config.context == reference.config.max_position_embeddings - unused
    assert largest < 1e-4


LAYOUTS = {
    "as transformers writes it": lambda tensors: tensors,
    "without the leading name": lambda tensors: renamed(tensors, r"^(roberta|bert)\.", ""),
    "gamma and beta": lambda tensors: renamed(
        renamed(tensors, "(LayerNorm).weight", r"\1.gamma"), "(LayerNorm).bias", r"\1.beta"
    ),
    "the bias in the decoder alone": lambda tensors: without(tensors, "lm_head.bias", "predictions.bias"),
    "the bias in the head alone": lambda tensors: without(tensors, "decoder.bias"),
    "no decoder, which is tied": lambda tensors: without(tensors, "decoder.weight", "decoder.bias"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_layout_of_names_gives_the_same_model(kind, layout, originals, run, tmp_path, capsys):
    original, reference = originals[kind]
    folder = shutil.copytree(original, tmp_path / "model")
    save_weights(folder, LAYOUTS[layout](reference.state_dict()))
    run(folder, "--out", tmp_path / "out.pt")
    model = load_checkpoint(tmp_path / "out.pt")[0]
    assert_equal(model.state_dict(), in_memory(original, reference.state_dict()).state_dict())
    assert model.head.weight is model.token_embedding.weight
    assert largest_difference(model, reference, [9]) < 1e-4
    assert "not used" not in capsys.readouterr().out


def test_of_two_biases_that_differ_the_decoder_s_is_in_use(merges, tmp_path):
    reference = write_roberta(tmp_path / "model", merges[:5], tie_word_embeddings=False)
    tensors = reference.state_dict()
    assert not tensors["lm_head.bias"].equal(tensors["lm_head.decoder.bias"])
    for ordered in (tensors, dict(reversed(tensors.items()))):
        model = in_memory(tmp_path / "model", ordered)
        assert model.head.bias.equal(tensors["lm_head.decoder.bias"])


UNUSED = {
    "roberta": ("roberta.pooler.dense.weight", "classifier.out_proj.bias", "roberta.embeddings.position_ids"),
    "bert": (
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.species.bias",
        "bert.embeddings.position_ids",
    ),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_heads_that_are_not_used_are_skipped_and_listed(kind, originals, run, tmp_path, capsys):
    original, reference = originals[kind]
    folder = shutil.copytree(original, tmp_path / "model")
    save_weights(folder, reference.state_dict() | dict.fromkeys(UNUSED[kind], torch.arange(3)))
    run(folder, "--out", tmp_path / "out.pt")
    model = load_checkpoint(tmp_path / "out.pt")[0]
    assert_equal(model.state_dict(), in_memory(original, reference.state_dict()).state_dict())
    listed = next(line for line in capsys.readouterr().out.splitlines() if "not used" in line)
    assert all(name in listed for name in UNUSED[kind])
    assert listed.count(",") == len(UNUSED[kind]) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32_of_the_same_values(dtype, originals, roberta, run, tmp_path):
    half = {name: tensor.to(dtype) for name, tensor in originals["roberta"][1].state_dict().items()}
    save_weights(roberta, half)
    run(roberta, "--out", tmp_path / "out.pt")
    model = load_checkpoint(tmp_path / "out.pt")[0]
    full = {name: tensor.float() for name, tensor in half.items()}
    assert_equal(model.state_dict(), in_memory(roberta, full).state_dict())


@pytest.fixture
def safetensors_only(originals, roberta):
    """The small RoBERTa's folder with model.safetensors in the place of pytorch_model.bin."""
    (roberta / "pytorch_model.bin").unlink()
    tensors = {name: tensor.clone() for name, tensor in originals["roberta"][1].state_dict().items()}
    save_file(tensors, roberta / "model.safetensors")
    return roberta


def test_safetensors_are_read_where_they_are_the_only_file(safetensors_only, expected, run, tmp_path):
    run(safetensors_only, "--out", tmp_path / "out.pt")
    assert_equal(load_checkpoint(tmp_path / "out.pt")[0].state_dict(), expected)


LAYER = "roberta.encoder.layer.1.attention.self.query.weight"
OTHER_WEIGHTS = {
    "an unknown tensor": (lambda t: t | {"roberta.adapter.weight": torch.ones(2)}, "roberta.adapter.weight"),
    "a layer too many": (lambda t: t | {LAYER.replace("1", "2"): t[LAYER]}, "encoder.layer.2.attention"),
    "a layer's tensor missing": (lambda t: without(t, LAYER), LAYER.removeprefix("roberta.")),
    "no head": (lambda t: without(t, "lm_head.dense.weight"), "lm_head.dense.weight"),
    "no bias": (lambda t: without(t, "lm_head.bias", "decoder.bias"), "lm_head.bias"),
    "no embedding": (lambda t: without(t, "word_embeddings.weight"), "embeddings.word_embeddings.weight"),
    "another shape": (lambda t: t | {LAYER: torch.ones(32, 33)}, "(32, 33)"),
    "a position too few": (
        lambda t: {k: v[:-1] if "position_embeddings" in k else v for k, v in t.items()},
        "embeddings.position_embeddings.weight",
    ),
}


@pytest.mark.parametrize("change", OTHER_WEIGHTS)
def test_a_tensor_that_is_left_over_missing_or_of_another_shape_is_named(change, originals, roberta, mistake, tmp_path):
    alter, name = OTHER_WEIGHTS[change]
    save_weights(roberta, alter(originals["roberta"][1].state_dict()))
    assert name in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


EXPORTED = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "hidden_act": "gelu_new", "type_vocab_size": 2},
    "pad 0": {"first": ("<pad>", "<s>", "</s>", "<unk>", "madeupword0000"), "layer_norm_eps": 1e-3},
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_the_original_for_transformers_and_for_us(name, merges, run, tmp_path):
    original, exported = tmp_path / "model", tmp_path / "exported"
    reference = write_roberta(original, merges, **EXPORTED[name])
    save_weights(original, reference.state_dict())
    run(original, "--out", tmp_path / "a.pt")
    run(tmp_path / "a.pt", "--export", exported)
    loaded, report = transformers.RobertaForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = loaded.lm_head.decoder.weight is loaded.roberta.embeddings.word_embeddings.weight
    assert tied == loaded.config.tie_word_embeddings == reference.config.tie_word_embeddings
    used = without(reference.state_dict(), "lm_head.bias")  # untied, theirs is not in use
    assert_equal(without(loaded.state_dict(), "lm_head.bias"), used)
    assert same_vocabulary(exported, original)
    text = "def café(self):  return 'naïve' 🙂"
    their_tokenizer = transformers.RobertaTokenizerFast.from_pretrained(exported)
    model, tokenizer, _ = load_checkpoint(tmp_path / "a.pt")
    assert their_tokenizer(text).input_ids == tokenizer.encode_line(f"{text}\n")
    run(exported, "--out", tmp_path / "b.pt")
    again, tokenizer_again, _ = load_checkpoint(tmp_path / "b.pt")
    assert largest_difference(model, loaded.eval(), [20]) < 1e-4
    assert again.config == model.config
    assert tokenizer_again.state == tokenizer.state
    assert_equal(again.state_dict(), model.state_dict())


def recipes():
    """The flags of data/roberta/README.md's lines that fine-tune RoBERTa, without those that name files."""
    readme = (ROOT / "data" / "roberta" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python train.py (.*--epochs.*)$", readme, re.MULTILINE)
    return [re.sub(r"--(init_from|data|out_dir) \S+", "", line).split() for line in lines]


@pytest.mark.parametrize("flags", recipes(), ids=["post", "ours"])
def test_fine_tuned_from_conversion_to_export(flags, originals, run, tmp_path):
    """The README's recipe, on a small model and corpus; what is exported is what was trained."""
    folder, original = originals["roberta"]
    run(folder, "--out", tmp_path / "a.pt")
    text = library_text()[:20_000]
    for name in ("wiki.train.raw", "wiki.valid.raw"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    arguments = ["--file", tmp_path, "--tokenizer", tmp_path / "a.pt"]
    run(*arguments, main=wikitext_prepare.main)
    size = ["--context", 20, "--prompt_len", "0:4", "--evals", 1, "--epochs", 0.5]
    out_dir = tmp_path / "out"
    files = ["--init_from", tmp_path / "a.pt", "--data", "wikitext2", "--out_dir", out_dir]
    run(*flags, *size, *files, main=train.main)
    train_split, *_ = load_corpus("wikitext2")
    model, _, checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    assert checkpoint["step"] == math.ceil(0.5 * len(train_split) / (16 * 20))
    run(out_dir / "ckpt.pt", "--export", tmp_path / "exported")
    reference = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "exported").eval()
    assert largest_difference(model, reference, [2, 20]) < 1e-4
    assert largest_difference(model, original, [20]) > 1e-3


def test_only_a_roberta_is_exported_and_only_to_a_folder_without_a_model(originals, roberta, run, mistake, tmp_path):
    run(originals["bert"][0], "--out", tmp_path / "bert.pt")
    run(roberta, "--out", tmp_path / "roberta.pt")
    save_checkpoint(tmp_path / "bytes.pt", Transformer(ModelConfig(n_embd=16, n_layer=1)), ByteTokenizer())
    for name in ("bert.pt", "bytes.pt"):
        assert "not a RoBERTa" in mistake(tmp_path / name, "--export", tmp_path / "new")
    for name, changes in (("block", {"block": 4}), ("shift_id", {"shift_id": 2, "context": 23})):
        model, tokenizer, _ = load_checkpoint(tmp_path / "roberta.pt", **changes)
        save_checkpoint(tmp_path / f"{name}.pt", model, tokenizer)
        sentence = mistake(tmp_path / f"{name}.pt", "--export", tmp_path / "new")
        assert f"not a RoBERTa, and only that can be exported; its {name} is {changes[name]}" in sentence
    assert "in it already" in mistake(tmp_path / "roberta.pt", "--export", roberta)
    assert "--out" in mistake(tmp_path / "roberta.pt", "--export", tmp_path / "new", "--out", "x.pt")
    assert "no such checkpoint" in mistake(tmp_path / "none.pt", "--export", tmp_path / "new")


@pytest.fixture(scope="session", params=["trained", "gpt2"])
def vocabulary(request, merges, tmp_path_factory):
    """A folder with vocab.json and merges.txt, and how many tokens these have."""
    folder = tmp_path_factory.mktemp("vocabulary")
    if request.param == "trained":
        return folder, write_bpe(folder, merges)
    if "GPT2_BPE" not in os.environ:
        pytest.skip("GPT2_BPE does not name a folder with GPT-2's vocab.json and merges.txt")
    source = Path(os.environ["GPT2_BPE"])
    shutil.copy(source / "merges.txt", folder)
    tokens = list(json.loads((source / "vocab.json").read_text(encoding="utf-8")))
    random.Random(0).shuffle(tokens)
    tokens = [*FIRST, *tokens, *(f"madeupword{i:04}" for i in range(3)), "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder, len(tokens)


def test_tokens_are_those_of_the_reference_and_hold_the_text(vocabulary, mixed_lines):
    folder, size = vocabulary
    tokenizer = read_bpe(folder, size)
    reference = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for line, expected in zip(mixed_lines, reference.encode_batch(mixed_lines)):
        ids = tokenizer.encode(line)
        assert ids == expected.ids, line
        assert tokenizer.decode(ids) == line


def test_writing_a_vocabulary_is_the_inverse_of_reading_it(vocabulary, tmp_path):
    texts = bpe_files(read_bpe(*vocabulary))
    for name, text in zip(("vocab.json", "merges.txt"), texts):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert same_vocabulary(tmp_path, vocabulary[0])


def test_every_character_of_unicode_comes_back(vocabulary):
    tokenizer = read_bpe(*vocabulary)
    for start in range(0, 0x110000, 0x800):
        if start != 0xD800:  # the surrogates are no characters
            characters = map(chr, range(start, start + 0x800))
            text = "".join(f"a{c}b 1{c}{c} {c}." for c in characters)
            assert tokenizer.decode(tokenizer.encode(text)) == text, hex(start)


def test_special_tokens_written_out_stay_text(vocabulary):
    tokenizer = read_bpe(*vocabulary)
    assert set(FIRST) | {"<mask>"} <= set(tokenizer.special)
    for name in tokenizer.special:
        ids = tokenizer.encode(f"{name} and {name}")
        assert not set(ids) & set(tokenizer.special_ids)
        assert tokenizer.decode(ids) == f"{name} and {name}"


def test_special_tokens_have_their_ids_and_are_decoded_as_what_they_mean(vocabulary):
    folder, size = vocabulary
    tokenizer = read_bpe(folder, size)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 2, size - 1)
    assert tokenizer.encode_line("one\n") == [0, *tokenizer.encode("one"), 2]
    assert tokenizer.decode([0, *tokenizer.encode("one"), size - 1, 1, 2]) == "one<mask>\n"


def test_a_megabyte_of_text_is_encoded_in_a_second(vocabulary):
    tokenizer = read_bpe(*vocabulary)
    text = library_text().encode()[: 2**20].decode(errors="ignore")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        tokenizer.encode(text)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


@pytest.fixture(scope="session")
def wordpieces(tmp_path_factory):
    """Two folders with a vocab.txt each, made of the standard library's words."""
    folders = {}
    for name in ("cased", "uncased"):
        text = library_text()[:2_000_000] + "ÅÉéüßñ åÆ 漢字語 你好 абвЖЗИ σςΣ —«»…"
        text = text if name == "cased" else text.lower()
        words = [word for word, _ in Counter(re.findall(r"[^\W_]+", text)).most_common(1500)]
        pieces = sorted(set(text) - set(" \t\n\r\f")) + words
        pieces += [f"##{piece}" for piece in pieces] + [f"##{word[2:]}" for word in words if word[2:]]
        folders[name] = tmp_path_factory.mktemp(name)
        tokens = list(dict.fromkeys([*PROTEINS[:5], *pieces]))
        (folders[name] / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return folders


def stable(c):
    """Whether c has been in Unicode since 3.2 as it is now; of newer ones, libraries know this or that."""
    # A capital sigma that ends a word becomes another letter in Python and in the first BERT, but
    # not in tokenizers.
    return unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c) not in ("Cn", "Cs") and c != "Σ"


def words_of(mixed_lines):
    """The mixed lines with stable characters alone, but for those that have a special token written out."""
    special = re.compile("|".join(map(re.escape, PROTEINS[:5])))
    return ["".join(filter(stable, line)) for line in mixed_lines if not special.search(line)]


WORDPIECE_SETTINGS = [
    ("uncased", {"do_lower_case": True}),
    ("cased", {"do_lower_case": False}),
    ("cased", {"do_lower_case": True}),
    ("uncased", {"do_lower_case": True, "strip_accents": False}),
    ("cased", {"do_lower_case": False, "strip_accents": True}),
    ("cased", {"do_lower_case": False, "tokenize_chinese_chars": False}),
]


@pytest.mark.parametrize(("name", "settings"), WORDPIECE_SETTINGS)
def test_wordpieces_are_those_of_the_reference_as_tokenizer_config_says(
    name, settings, wordpieces, mixed_lines, tmp_path
):
    folder = shutil.copytree(wordpieces[name], tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = prepare.read_wordpiece(folder, 0)
    reference = transformers.BertTokenizerFast.from_pretrained(folder, **settings)
    lines = words_of(mixed_lines)[:: 1 if settings == {"do_lower_case": name == "uncased"} else 4]
    lines += ["x" * 100, "x" * 101, "é" * 101, "漢é,字!" * 30, "naïve-Façade", "don't. #hash [brackets]"]
    expected = reference(lines, add_special_tokens=False).input_ids
    for line, ids in zip(lines, expected):
        assert tokenizer.encode(line) == ids, line
    assert len({i for ids in expected for i in ids}) > 1000


def test_every_stable_character_is_cut_as_the_reference_cuts_it(wordpieces):
    tokenizer = prepare.read_wordpiece(wordpieces["uncased"], 0)
    reference = transformers.BertTokenizerFast.from_pretrained(wordpieces["uncased"], do_lower_case=True)
    texts = [f"a{c}b 1{c}{c} {c}." for c in filter(stable, map(chr, range(0x20000)))]
    for text, ids in zip(texts, reference(texts, add_special_tokens=False).input_ids):
        assert tokenizer.encode(text) == ids, text


def test_without_a_config_a_vocabulary_with_capitals_is_cased(wordpieces):
    for name in wordpieces:
        state = prepare.read_wordpiece(wordpieces[name], 0).state
        assert (state["lowercase"], state["strip_accents"]) == (name == "uncased", name == "uncased")
        assert state["split_chinese"]


def test_wordpieces_decode_to_words(wordpieces):
    tokenizer = prepare.read_wordpiece(wordpieces["cased"], 0)
    text = "import the Unbelievableness of zxqj words"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode_line(f"{text}\n")) == f"{text}\n"
    assert tokenizer.mask_id not in tokenizer.encode("[MASK]")


def test_an_alphabet_is_one_token_a_letter(originals):
    folder, _ = originals["bert"]
    tokenizer = prepare.read_wordpiece(folder, len(PROTEINS))
    ids = tokenizer.encode("MKTAYIAK")
    assert ids == [PROTEINS.index(letter) for letter in "MKTAYIAK"]
    assert tokenizer.decode(ids) == "MKTAYIAK"
    reference = transformers.BertTokenizerFast.from_pretrained(folder, do_lower_case=False)
    assert tokenizer.encode("M K T") == reference("M K T", add_special_tokens=False).input_ids
    assert tokenizer.encode("MKJT") == [*tokenizer.encode("MK"), PROTEINS.index("[UNK]"), PROTEINS.index("T")]


@pytest.mark.parametrize("order", [*sample.ORDERS, "remask"])
def test_samples_are_text_however_likely_the_special_tokens_are(order, originals, roberta, run, tmp_path, capsys):
    bert = shutil.copytree(originals["bert"][0], tmp_path / "bert")
    for kind, folder, bias in (("roberta", roberta, "lm_head"), ("bert", bert, "cls.predictions")):
        tensors = originals[kind][1].state_dict()
        likely = tensors[f"{bias}.bias"].clone()
        likely[[0, 1, 2, 3, -1] if kind == "roberta" else slice(5)] = 50
        save_weights(folder, without(tensors, "decoder.bias") | {f"{bias}.bias": likely})
        run(folder, "--out", tmp_path / f"{kind}.pt")
    capsys.readouterr()
    flags = ("--order", order, "--num_samples", 3, "--seed", 1)
    flags += () if order in ("threshold", "entropy-bound") else ("--steps", 5)
    run("--ckpt", tmp_path / "bert.pt", *flags, "--prompt", "MK<mask*9>T", main=sample.main)
    texts = capsys.readouterr().out.split()
    assert [(text[:2], text[-1], len(text)) for text in texts] == [("MK", "T", 12)] * 3
    assert set("".join(texts)) <= set(LETTERS)
    run("--ckpt", tmp_path / "roberta.pt", *flags, "--prompt", "def", main=sample.main)
    assert "<mask>" not in capsys.readouterr().out
    model, tokenizer, _ = load_checkpoint(tmp_path / "roberta.pt")
    canvas = torch.full((4, 20), tokenizer.mask_id)
    *_, canvas = sample.denoise(model, canvas, 5, order)
    assert not torch.isin(canvas, torch.tensor(tokenizer.special_ids)).any()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("roberta", name) for name in ("config.json", "vocab.json", "merges.txt", "pytorch_model.bin")),
        *(("bert", name) for name in ("config.json", "vocab.txt", "pytorch_model.bin")),
    ],
)
def test_a_file_that_is_missing_is_named(kind, name, originals, mistake, tmp_path):
    folder = shutil.copytree(originals[kind][0], tmp_path / "model")
    (folder / name).unlink()
    assert f"no {name} in it" in mistake(folder, "--out", tmp_path / "new" / "out.pt")


OTHER_CONFIGS = [
    ({"model_type": "gpt2"}, "gpt2"),
    ({"model_type": None, "architectures": ["T5Model"]}, "None"),
    ({"hidden_act": "swiglu"}, "swiglu"),
    ({"position_embedding_type": "relative_key"}, "relative_key"),
    ({"is_decoder": True}, "is_decoder"),
    ({"num_attention_heads": 5}, "num_attention_heads"),
    ({"vocab_size": 100}, "100 in config.json"),
    ({"vocab_size": 999}, "999 in config.json"),
    ({"vocab_size": 10**12}, "in config.json"),
    ({"vocab_size": 464}, "word_embeddings"),
    ({"num_attention_heads": 0}, "num_attention_heads cannot be 0"),
    ({"hidden_size": "768"}, "hidden_size cannot be 768"),
    ({"pad_token_id": -1}, "pad_token_id cannot be -1"),
    ({"hidden_size": 64}, "64)"),
    ({"num_hidden_layers": 3}, "encoder.layer.2."),
    ({"num_hidden_layers": 1}, "encoder.layer.1."),
]


@pytest.mark.parametrize(("changes", "reason"), OTHER_CONFIGS)
def test_a_config_that_is_of_another_model_is_refused_by_name(changes, reason, roberta, mistake, tmp_path):
    edit(roberta / "config.json", **changes)
    assert reason in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


@pytest.mark.parametrize("name", ["config.json", "vocab.json"])
@pytest.mark.parametrize("content", ["truncated", "", "[1, 2]", "null", "\xff"])
def test_json_that_is_truncated_or_something_else(name, content, roberta, mistake, tmp_path):
    path = roberta / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content.encode("latin-1"))
    assert name in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


def test_merges_of_another_vocabulary(merges, roberta, mistake, tmp_path):
    path = roberta / "merges.txt"
    for lines in (merges[:300], [*merges[:200], "q q q"]):
        path.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
        assert "do not belong together" in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_truncated_merges(cut, roberta, mistake, tmp_path):
    path = roberta / "merges.txt"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("\n", len(text) // 2) + 1 - cut], encoding="utf-8")
    assert "merges.txt" in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


def test_a_vocabulary_whose_ids_are_no_numbers(roberta, mistake, tmp_path):
    edit(roberta / "vocab.json", **{"<unk>": None})
    assert "vocab.json" in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


@pytest.mark.parametrize(("token", "reason"), [("[UNK]", r"[UNK]"), ("[MASK]", "<mask>"), ("", "in config.json")])
def test_a_word_vocabulary_that_lacks_a_token(token, reason, originals, mistake, tmp_path):
    folder = shutil.copytree(originals["bert"][0], tmp_path / "model")
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    kept = [f"x{token}" if line == token else line for line in lines] if token else lines[:-1]
    (folder / "vocab.txt").write_text("\n".join([*kept, ""]), encoding="utf-8")
    assert reason in mistake(folder, "--out", tmp_path / "new" / "out.pt")
    (folder / "vocab.txt").write_text("\n".join(lines[:-1]), encoding="utf-8")
    assert "vocab.txt: truncated" in mistake(folder, "--out", tmp_path / "new" / "out.pt")


def test_a_vocabulary_whose_ids_have_a_gap(roberta, mistake, tmp_path):
    edit(roberta / "vocab.json", **{"<unk>": 5000})
    assert "vocab.json" in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_weights(form, share, originals, roberta, mistake, tmp_path):
    path = roberta / "pytorch_model.bin"
    tensors = originals["roberta"][1].state_dict()
    if form == "safetensors":
        path.unlink()
        path = roberta / "model.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:
        save_weights(roberta, tensors, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert path.name in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


class Malicious:
    def __reduce__(self):
        return os.system, ("echo executed > executed",)


def test_a_pickle_that_would_run_code_does_not(originals, roberta, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = originals["roberta"][1].state_dict()
    for content in (Malicious(), {"weight": Malicious()}, {**tensors, "lm_head.bias": Malicious()}):
        for zipped in (True, False):
            save_weights(roberta, content, _use_new_zipfile_serialization=zipped)
            assert "pytorch_model.bin" in mistake(roberta, "--out", "new/out.pt")
    (roberta / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    assert "pytorch_model.bin" in mistake(roberta, "--out", "new/out.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": {"weight": torch.ones(2)}}, torch.ones(2)])
def test_a_file_of_something_else_than_tensors_by_name(content, roberta, mistake, tmp_path):
    save_weights(roberta, content)
    assert "pytorch_model.bin" in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


def test_a_source_that_is_nothing_we_know(mistake, tmp_path):
    assert "roberta-base" in mistake(tmp_path / "none")


SAVED = {  # a family, and what may differ from its smallest model
    "setitem": [{}, {"conv": 0}, {"block": 4}, {"block": 1, "shift_id": 256}],
    "bert": [{}, {"tied": True}, {"first_position": 2, "token_types": 1, "head_activation": "relu"}],
    "gpt2": [{"block": 1, "shift_id": 256}, {"shift_id": 256, "tied": True}, {"mlp_width": 24, "norm_eps": 1e-2}],
    "mdlm": [{}, {"block": 4, "activation": "gelu_tanh"}, {"tied": True}],
    "llada": [{}, {"n_kv_head": 1, "rope_base": 1234.0}, {"tied": True, "activation": "gelu"}],
}


def small_model(family, **settings):
    network = Transformer if family == "setitem" else published_network(family)
    return tiny_model(V=256, T=12, network=network, **settings)


@pytest.mark.parametrize(("family", "settings"), [(name, each) for name in SAVED for each in SAVED[name]], ids=str)
def test_a_model_of_every_family_is_loaded_as_it_was_saved(family, settings, tmp_path):
    saved = small_model(family, **settings)
    save_checkpoint(tmp_path / "model.pt", saved, ByteTokenizer())
    model, tokenizer, checkpoint = load_checkpoint(tmp_path / "model.pt")
    assert SAVED.keys() == {"setitem", *FAMILIES}
    assert checkpoint["family"] == model.family == family
    assert type(model) is type(saved)
    assert (type(model.config), model.config) == (type(saved.config), saved.config)
    assert tokenizer.state == ByteTokenizer().state
    assert_equal(model.state_dict(), saved.state_dict())
    tied = settings.get("tied", False)
    assert (model.head.weight is model.token_embedding.weight) == tied
    ids = torch.randint(257, (3, 12))  # some of them holes
    with torch.no_grad():
        assert model(ids).equal(saved(ids))
        assert model(ids, clean=ids.clamp(max=255)).equal(saved(ids, clean=ids.clamp(max=255)))


def edit_checkpoint(path, change):
    """Change the dict in a checkpoint, and keep it undamaged."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


HOSTILE = ["mamba", "os", "../x", "hub", "parts", "bert.Network", "data.weights.bert", "Bert", "bert\0", ""]
HOSTILE += [3, None, True, ["bert"], ("gpt2",), {"bert": 1}, "bert\nbert", "x" * 10_000]


def test_a_family_that_is_unknown_or_missing_is_refused_and_nothing_is_imported(mistake, tmp_path, monkeypatch):
    path, imported = tmp_path / "model.pt", []
    save_checkpoint(path, small_model("bert"), ByteTokenizer())
    monkeypatch.setattr(data.lib.checkpoint, "import_module", imported.append)
    for family in HOSTILE:
        edit_checkpoint(path, lambda checkpoint, family=family: checkpoint.update(family=family))
        sentence = mistake("--ckpt", path, main=sample.main)
        assert f"{path}: not a checkpoint of setitem" in sentence
        assert f"its family {family!r}"[:100] in sentence
        assert len(sentence) < 300 + len(str(path))
    edit_checkpoint(path, lambda checkpoint: checkpoint.pop("family"))
    assert f"{path}: not a checkpoint of setitem" in mistake("--ckpt", path, main=sample.main)
    assert imported == []


def test_a_checkpoint_that_names_another_family_than_its_own_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    for family in SAVED:
        for settings in SAVED[family]:
            for other in SAVED.keys() - {family}:
                save_checkpoint(path, small_model(family, **settings), ByteTokenizer())
                edit_checkpoint(path, lambda checkpoint, other=other: checkpoint.update(family=other))
                with pytest.raises(Mistake, match="not a checkpoint of setitem"):
                    load_checkpoint(path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"head_activation": "os.system"}),
        ("bert", {"activation": "swiglu"}),
        ("bert", {"token_types": 0}),
        ("bert", {"token_types": 3}),
        ("bert", {"first_position": -1}),
        ("bert", {"norm_eps": math.nan}),
        ("gpt2", {"mlp_width": 10**7}),
        ("gpt2", {"context": 13}),
        ("mdlm", {"first_position": 0}),
        ("mdlm", {"conv": 5}),
        ("llada", {"n_kv_head": 0}),
        ("llada", {"n_kv_head": 3}),
        ("llada", {"rope_base": 0.0}),
        ("llada", {"rope_base": -1.0}),
        ("llada", {"rope_base": "1e4"}),
        ("setitem", {"tied": False}),
    ],
    ids=str,
)
def test_settings_that_no_model_of_a_family_has_are_refused(family, changes, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, small_model(family, **({"n_kv_head": 1} if family == "llada" else {})), ByteTokenizer())
    load_checkpoint(path)
    edit_checkpoint(path, lambda checkpoint: checkpoint["config"].update(changes))
    with pytest.raises(Mistake, match="not a checkpoint of setitem"):
        load_checkpoint(path)


@pytest.fixture
def hub(originals, tmp_path, monkeypatch):
    """A server with the small RoBERTa as roberta-base.

    requests: (file, Range, User-Agent) of each; limit: bytes after which it hangs up; ranges: whether
    it knows them; careless: whether it gives one of another file than was asked for.
    """
    folder = tmp_path / "www" / "FacebookAI" / "roberta-base" / "resolve" / "main"
    shutil.copytree(originals["roberta"][0], folder)
    hub = SimpleNamespace(folder=folder, requests=[], limit=None, ranges=True, careless=False)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            span = self.headers["Range"]
            hub.requests.append((Path(self.path).name, span, self.headers["User-Agent"]))
            content = (tmp_path / "www" / self.path[1:]).read_bytes()
            etag, condition = f'"{zlib.crc32(content)}"', self.headers["If-Range"]
            same = hub.careless or condition in (None, etag)
            start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and hub.ranges and same else 0
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", etag)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start:][: hub.limit])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(data.weights.hub, "HUB", f"http://127.0.0.1:{httpd.server_port}")
        yield hub
        httpd.shutdown()
