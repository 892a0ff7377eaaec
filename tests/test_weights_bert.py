"""RoBERTa and BERT: the same logits and tokens as transformers', which is the reference, and back."""

import json
import math
import re
import shutil
import unicodedata
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import transformers
from model_files import (
    CLASSES,
    LETTERS,
    PROTEINS,
    ROOT,
    assert_equal,
    converted,
    edit,
    library_text,
    renamed,
    same_vocabulary,
    save_weights,
    shape,
    without,
    write_bert,
    write_roberta,
)

import data.lib.checkpoint
import data.lib.corpus
import data.weights.hub
import sample
import train
from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import load_corpus, tokenizer_by_name, write_corpus
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")


@pytest.fixture(scope="session")
def expected(originals):
    """Our tensors of the small RoBERTa."""
    folder, reference = originals["roberta"]
    return converted(folder).state_dict()


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
    model = converted(tmp_path / name, reference.state_dict())
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
    model = converted(tmp_path / "odd", reference.state_dict())
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
    assert_equal(model.state_dict(), converted(original).state_dict())
    assert model.head.weight is model.token_embedding.weight
    assert largest_difference(model, reference, [9]) < 1e-4
    assert "not used" not in capsys.readouterr().out


def test_of_two_biases_that_differ_the_decoder_s_is_in_use(merges, tmp_path):
    reference = write_roberta(tmp_path / "model", merges[:5], tie_word_embeddings=False)
    tensors = reference.state_dict()
    assert not tensors["lm_head.bias"].equal(tensors["lm_head.decoder.bias"])
    for ordered in (tensors, dict(reversed(tensors.items()))):
        model = converted(tmp_path / "model", ordered)
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
    assert_equal(model.state_dict(), converted(original).state_dict())
    listed = next(line for line in capsys.readouterr().out.splitlines() if "not used" in line)
    assert all(re.sub(r"^(roberta|bert)\.", "", name) in listed for name in UNUSED[kind])
    assert listed.count(",") == len(UNUSED[kind]) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32_of_the_same_values(dtype, originals, roberta, run, tmp_path):
    half = {name: tensor.to(dtype) for name, tensor in originals["roberta"][1].state_dict().items()}
    save_weights(roberta, half)
    run(roberta, "--out", tmp_path / "out.pt")
    model = load_checkpoint(tmp_path / "out.pt")[0]
    full = {name: tensor.float() for name, tensor in half.items()}
    assert_equal(model.state_dict(), converted(roberta, full).state_dict())


@pytest.mark.parametrize("kind", CLASSES)
def test_without_a_head_the_last_layer_s_vectors_meet_the_embedding(kind, originals, run, tmp_path, capsys):
    original, reference = originals[kind]
    folder = shutil.copytree(original, tmp_path / "model")
    save_weights(folder, reference.base_model.state_dict())
    run(folder, "--out", tmp_path / "out.pt")
    assert "has to teach it" in capsys.readouterr().out
    model = load_checkpoint(tmp_path / "out.pt")[0].eval()
    with torch.no_grad():
        last = reference.base_model(ids := random_ids(reference.config, 2, 9)).last_hidden_state
        similar = F.layer_norm(last, last.shape[-1:]) @ model.token_embedding.weight.T
        logits = model(ids)
    text = torch.arange(logits.shape[-1]) != model.config.mask_id
    assert F.cosine_similarity(logits[..., text], similar[..., text], -1).min() > 0.99


LAYER = "roberta.encoder.layer.1.attention.self.query.weight"
OTHER_WEIGHTS = {
    "an unknown tensor": (lambda t: t | {"roberta.adapter.weight": torch.ones(2)}, "adapter.weight"),
    "a layer too many": (lambda t: t | {LAYER.replace("1", "2"): t[LAYER]}, "layers.2.attention"),
    "a layer's tensor missing": (lambda t: without(t, LAYER), "layers.1.attention.query.weight"),
    "half a head": (lambda t: without(t, "lm_head.dense.weight"), "transform.weight"),
    "no bias": (lambda t: without(t, "lm_head.bias", "decoder.bias"), "head.bias"),
    "no embedding": (lambda t: without(t, "word_embeddings.weight"), "token_embedding.weight"),
    "another shape": (lambda t: t | {LAYER: torch.ones(32, 33)}, "[32, 33]"),
    "a position too few": (
        lambda t: {k: v[:-1] if "position_embeddings" in k else v for k, v in t.items()},
        "position_embedding.weight",
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
    """The flags of data/weights/README.md's lines that fine-tune RoBERTa, without those that name files."""
    readme = (ROOT / "data" / "weights" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python train.py (.*--epochs.*)$", readme, re.MULTILINE)
    return [re.sub(r"--(init_from|data|out_dir) \S+", "", line).split() for line in lines]


@pytest.mark.parametrize("flags", recipes(), ids=["post", "ours"])
def test_fine_tuned_from_conversion_to_export(flags, originals, run, tmp_path):
    """The README's recipe, on a small model and corpus; what is exported is what was trained."""
    folder, original = originals["roberta"]
    run(folder, "--out", tmp_path / "a.pt")
    text, tokenizer = library_text()[:20_000], tokenizer_by_name(str(tmp_path / "a.pt"))
    lines = [(split, line) for split in ("train", "val") for line in text.splitlines(keepends=True) if line.strip()]
    write_corpus("wikitext2", lines, tokenizer, "test", by_line=True)
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


def read_wordpiece(folder):
    """The tokenizer of a folder's vocab.txt, without unused tokens."""
    n_rows = len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    return data.weights.hub.read_wordpiece(folder, n_rows)


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
    tokenizer = read_wordpiece(folder)
    reference = transformers.BertTokenizerFast.from_pretrained(folder, **settings)
    lines = words_of(mixed_lines)[:: 1 if settings == {"do_lower_case": name == "uncased"} else 4]
    lines += ["x" * 100, "x" * 101, "é" * 101, "漢é,字!" * 30, "naïve-Façade", "don't. #hash [brackets]"]
    expected = reference(lines, add_special_tokens=False).input_ids
    for line, ids in zip(lines, expected):
        assert tokenizer.encode(line) == ids, line
    assert len({i for ids in expected for i in ids}) > 1000


def test_every_stable_character_is_cut_as_the_reference_cuts_it(wordpieces):
    tokenizer = read_wordpiece(wordpieces["uncased"])
    reference = transformers.BertTokenizerFast.from_pretrained(wordpieces["uncased"], do_lower_case=True)
    texts = [f"a{c}b 1{c}{c} {c}." for c in filter(stable, map(chr, range(0x20000)))]
    for text, ids in zip(texts, reference(texts, add_special_tokens=False).input_ids):
        assert tokenizer.encode(text) == ids, text


def test_without_a_config_a_vocabulary_with_capitals_is_cased(wordpieces):
    for name in wordpieces:
        state = read_wordpiece(wordpieces[name]).state
        assert (state["lowercase"], state["strip_accents"]) == (name == "uncased", name == "uncased")
        assert state["split_chinese"]


def test_wordpieces_decode_to_words(wordpieces):
    tokenizer = read_wordpiece(wordpieces["cased"])
    text = "import the Unbelievableness of zxqj words"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode_line(f"{text}\n")) == f"{text}\n"
    assert tokenizer.mask_id not in tokenizer.encode("[MASK]")


def test_what_was_trained_with_another_attention_is_not_exported(originals, run, mistake, tmp_path):
    for kind in originals:
        run(originals[kind][0], "--out", tmp_path / f"{kind}.pt")
        for name, changes in (("block", {"block": 4}), ("shift", {"shift_id": 2, "context": 23})):
            model, tokenizer, _ = load_checkpoint(tmp_path / "roberta.pt", **changes)
            save_checkpoint(tmp_path / f"{name}.pt", model, tokenizer)
            assert "another attention" in mistake(tmp_path / f"{name}.pt", "--export", tmp_path / "new")


BERT_EXPORTED = {
    "cased, with accents": {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": True},
    "uncased": {"do_lower_case": True, "strip_accents": True, "tokenize_chinese_chars": False},
}


@pytest.mark.parametrize("name", BERT_EXPORTED)
def test_an_exported_bert_is_the_original_for_transformers_and_for_us(name, wordpieces, run, tmp_path):
    tokens = (wordpieces["uncased" if name == "uncased" else "cased"] / "vocab.txt").read_text().splitlines()
    reference = write_bert(tmp_path / "model", tokens, hidden_act="gelu_new", tie_word_embeddings=name == "uncased")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(BERT_EXPORTED[name]))
    save_weights(tmp_path / "model", reference.state_dict())
    run(tmp_path / "model", "--out", tmp_path / "a.pt")
    exported = tmp_path / "exported"
    run(tmp_path / "a.pt", "--export", exported)
    assert (exported / "vocab.txt").read_bytes() == (tmp_path / "model" / "vocab.txt").read_bytes()
    loaded, report = transformers.BertForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    used = without(reference.state_dict(), "predictions.bias")  # untied, theirs is not in use
    assert_equal(without(loaded.state_dict(), "predictions.bias"), used)
    for setting in ("hidden_act", "pad_token_id", "max_position_embeddings", "tie_word_embeddings", "layer_norm_eps"):
        assert getattr(loaded.config, setting) == getattr(reference.config, setting)
    model, tokenizer, _ = load_checkpoint(tmp_path / "a.pt")
    assert largest_difference(model, loaded.eval(), [20]) < 1e-4
    text = "Import THE naïve Façade, 漢字!"
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert their_tokenizer(text).input_ids == tokenizer.encode_line(f"{text}\n")
    run(exported, "--out", tmp_path / "b.pt")
    again, tokenizer_again, _ = load_checkpoint(tmp_path / "b.pt")
    assert again.config == model.config
    assert tokenizer_again.state == tokenizer.state
    assert_equal(again.state_dict(), model.state_dict())


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
    text = re.sub(r"--- \d of 3\n", "", capsys.readouterr().out)
    assert text.count("MK") >= 3
    assert set(text) <= set(LETTERS + " \n")
    run("--ckpt", tmp_path / "roberta.pt", *flags, "--prompt", "def", main=sample.main)
    assert "<mask>" not in capsys.readouterr().out
    model, tokenizer, _ = load_checkpoint(tmp_path / "roberta.pt")
    canvas = torch.full((4, 20), tokenizer.mask_id)
    *_, canvas = sample.denoise(model, canvas, 5, order)
    assert not torch.isin(canvas, torch.tensor(tokenizer.special_ids)).any()


OTHER_CONFIGS = [
    ({"hidden_act": "swiglu"}, "swiglu"),
    ({"position_embedding_type": "relative_key"}, "relative_key"),
    ({"is_decoder": True}, "is_decoder"),
    ({"num_attention_heads": 5}, "attention.query.weight"),
    ({"vocab_size": 100}, "100 rows"),
    ({"vocab_size": 10**12}, "1,000,000,000,000 rows"),
    ({"vocab_size": 464}, "token_embedding"),
    ({"num_attention_heads": 0}, "don't make a model"),
    ({"hidden_size": "768"}, "don't make a model"),
    ({"hidden_size": None}, "it has no hidden_size"),
    ({"hidden_size": 64}, "64]"),
    ({"num_hidden_layers": 3}, "layers.2."),
    ({"num_hidden_layers": 1}, "layers.1."),
]


@pytest.mark.parametrize(("changes", "reason"), OTHER_CONFIGS)
def test_a_config_that_is_of_another_model_is_refused_by_name(changes, reason, roberta, mistake, tmp_path):
    edit(roberta / "config.json", **changes)
    assert reason in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


@pytest.mark.parametrize("token", ["[UNK]", "[MASK]"])
def test_a_word_vocabulary_that_lacks_a_token(token, originals, mistake, tmp_path):
    folder = shutil.copytree(originals["bert"][0], tmp_path / "model")
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    kept = [f"x{token}" if line == token else line for line in lines]
    (folder / "vocab.txt").write_text("\n".join([*kept, ""]), encoding="utf-8")
    assert token in mistake(folder, "--out", tmp_path / "new" / "out.pt")
