"""GPT-2: the same logits, tokens and continuations as transformers', which is the reference, and back."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from model_files import (
    SMALL_GPT2,
    START,
    assert_equal,
    converted,
    edit,
    gpt2_shape,
    library_text,
    renamed,
    same_vocabulary,
    save_weights,
    without,
    write_diffugpt,
    write_gpt2,
)
from tokenizers import pre_tokenizers
from toys import tiny_model

import data.text.prepare as text_prepare
import data.weights.gpt2
import sample
import train
from data.lib.checkpoint import save_checkpoint
from data.lib.tokenizer import ByteTokenizer
from model import ModelConfig, Transformer, load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def original(merges, tmp_path_factory):
    """A small GPT-2, whole: its folder and its model."""
    folder = tmp_path_factory.mktemp("original") / "gpt2"
    model = write_gpt2(folder, merges[:200])
    save_weights(folder, model.state_dict())
    return folder, model


@pytest.fixture(scope="session")
def expected(original):
    """Our tensors of the small GPT-2."""
    return converted(original[0]).state_dict()


@pytest.fixture
def gpt2(original, tmp_path):
    """A copy of the small GPT-2's folder, for the test to change."""
    return shutil.copytree(original[0], tmp_path / "model")


@pytest.fixture
def checkpoint(original, run, tmp_path):
    """Our checkpoint of the small GPT-2."""
    run(original[0], "--out", tmp_path / "gpt2.pt")
    return tmp_path / "gpt2.pt"


# --- logits --------------------------------------------------------------------------------------


@torch.no_grad()
def largest_difference(model, reference, lengths):
    """The largest between the logits of random texts, which begin with START for the reference alone."""
    torch.manual_seed(0)
    largest = 0.0
    for T in lengths:
        ids = torch.randint(reference.config.vocab_size, (3, T))
        start = torch.full((3, 1), reference.config.bos_token_id)
        theirs = reference(torch.cat((start, ids[:, :-1]), 1)).logits  # (3, T, V), of the token that follows
        ours = model(ids)  # (3, T, V + 1), of the token that is there
        assert ours.dtype == torch.float32
        assert (ours[..., -1] == -torch.inf).all()
        largest = max(largest, (ours[..., :-1] - theirs).abs().max().item())
    return largest


REAL = {  # but for the vocabulary: shape, lengths
    "distilgpt2": (gpt2_shape(768, 6, 12, 1024), (1, 17, 1024)),
    "gpt2": (gpt2_shape(768, 12, 12, 1024), (1, 65, 1024)),
    "gpt2-medium": (gpt2_shape(1024, 24, 16, 1024), (2, 512)),
}
ODD = {
    "relu, a large eps, untied": {
        **gpt2_shape(36, 3, 3, 31, 50),
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-2,
        "tie_word_embeddings": False,
    },
    "gelu, one layer, one head": {**gpt2_shape(20, 1, 1, 40, 24), "activation_function": "gelu"},
    "silu, two positions": {**gpt2_shape(80, 2, 5, 2), "activation_function": "silu"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_logits_of_the_real_shapes_are_those_of_the_reference(name, merges, tmp_path):
    settings, lengths = REAL[name]
    reference = write_gpt2(tmp_path / name, merges[:40], **settings)
    model = converted(tmp_path / name, reference.state_dict())
    largest = largest_difference(model, reference, lengths)
    print(f"{name}: the largest difference is {largest:.1e}")
    assert model.config.context == 1024
    assert largest < 1e-4


@pytest.mark.parametrize("name", ODD)
def test_logits_of_odd_shapes_are_those_of_the_reference_at_every_length(name, merges, tmp_path):
    reference = write_gpt2(tmp_path / "odd", merges[:20], **ODD[name])
    model = converted(tmp_path / "odd", reference.state_dict())
    lengths = range(1, model.config.context + 1)
    largest = largest_difference(model, reference, lengths)
    print(f"{name}: the largest difference is {largest:.1e}")
    assert len(lengths) == ODD[name]["n_positions"]
    assert largest < 1e-4


def test_a_greedy_continuation_is_that_of_the_reference_token_for_token(merges, tmp_path):
    reference = write_gpt2(tmp_path / "model", merges[:200], **gpt2_shape(64, 3, 4, 60))
    model = converted(tmp_path / "model", reference.state_dict())
    start, vocab_size = reference.config.bos_token_id, reference.config.vocab_size
    reference.generation_config.eos_token_id = None  # else a text ends there
    for n_prompt in (0, 1, 20):
        prompt = torch.randint(start, (4, n_prompt))
        canvas = torch.cat((prompt, torch.full((4, 60 - n_prompt), model.config.mask_id)), 1)
        *_, ours = sample.denoise(model, canvas, temperature=0)
        read = torch.cat((torch.full((4, 1), start), prompt), 1)
        theirs = reference.generate(
            read,
            attention_mask=torch.ones_like(read),
            max_new_tokens=60 - n_prompt,
            do_sample=False,
            suppress_tokens=[start],
            pad_token_id=start,
        )
        assert ours.equal(theirs[:, 1:])
        assert ours.max() < vocab_size


def test_the_row_of_mask_is_the_mean_of_all_others_and_is_never_read(original):
    model = converted(original[0])
    table, mask_id = model.token_embedding.weight, model.config.mask_id
    assert mask_id == len(table) - 1 == original[1].config.vocab_size
    torch.testing.assert_close(table[-1], table[:-1].mean(0))
    ids = torch.randint(mask_id, (2, 20))
    canvas = ids.masked_fill(torch.arange(20) >= 12, mask_id)
    assert model(ids)[:, :13].equal(model(canvas)[:, :13])
    with torch.no_grad():
        before = model(ids)
        table[-1] = 100.0
    assert model(ids).equal(before)


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_reference_and_hold_the_text(original, checkpoint, mixed_lines):
    folder, reference = original
    tokenizer = load_checkpoint(checkpoint)[1]
    lines = mixed_lines[::4]
    their_tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder)
    for line, ids in zip(lines, their_tokenizer(lines).input_ids):
        if START not in line:  # which is text for ours, and a token for theirs
            assert tokenizer.encode(line) == ids, line
            assert tokenizer.decode(ids) == line


def test_special_tokens_are_not_text(original, checkpoint):
    start = original[1].config.bos_token_id
    model, tokenizer, _ = load_checkpoint(checkpoint)
    assert model.config.shift_id == start
    assert model.config.special_ids == tokenizer.special_ids == (start, tokenizer.mask_id)
    text = f"one{START} two <mask>"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_line("one\n") == tokenizer.encode("one\n")  # nothing opens or closes a line
    one, two = tokenizer.encode("one"), tokenizer.encode(" two")
    assert tokenizer.decode([start, *one, start, *two, tokenizer.mask_id]) == "\none\n two<mask>"


@torch.no_grad()
def test_a_judge_with_other_tokens_says_nats_per_byte(checkpoint, original, run, tmp_path, capsys):
    """Those of the reference without <|endoftext|>, which is never written; the bound counts it as well."""
    byte = tmp_path / "byte.pt"
    save_checkpoint(byte, tiny_model(V=256, T=32), ByteTokenizer())
    flags = "--prompt", "    return self.name(<mask*2>)\n", "--dtype", "float32"
    run("--ckpt", byte, *flags, main=sample.main)
    text = capsys.readouterr().out.removesuffix("\n")
    run("--ckpt", byte, checkpoint, "--judge", checkpoint, *flags, main=sample.main)
    written = capsys.readouterr()
    assert written.out.startswith(f"--- {byte}\n{text}")
    model, tokenizer, _ = load_checkpoint(checkpoint)
    start, ids = original[1].config.bos_token_id, tokenizer.encode(text)
    assert len(ids) <= 24 < len(text.encode())  # so that it is one window
    logits = original[1](torch.tensor([[start, *ids[:-1]]])).logits[0]
    bound = F.cross_entropy(logits, torch.tensor(ids)).item()
    assert float(train.nelbo(model, torch.tensor([ids]))) == pytest.approx(bound, abs=1e-4)
    logits[:, start] = -torch.inf
    nats = F.cross_entropy(logits, torch.tensor(ids), reduction="sum").item() / len(text.encode())
    assert nats * len(text.encode()) < bound * len(ids)
    judged = re.search(r"byte.pt: .* under .*gpt2.pt ([\d.]+) nats per byte", written.err)[1]
    assert float(judged) == pytest.approx(nats, abs=1e-3)


def test_rows_that_only_pad_come_back(merges, run, tmp_path):
    """Ids up to a multiple of 8 have no token in the files."""
    folder = tmp_path / "model"
    n = len({*pre_tokenizers.ByteLevel.alphabet(), *(m.replace(" ", "") for m in merges[:200])}) + 1
    reference = write_gpt2(folder, merges[:200])
    config = json.loads((folder / "config.json").read_text())
    padded = -(-n // 8) * 8 + 8
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": padded}))
    reference.resize_token_embeddings(padded, mean_resizing=False)
    save_weights(folder, reference.state_dict())
    run(folder, "--out", tmp_path / "a.pt")
    run(tmp_path / "a.pt", "--export", tmp_path / "exported")
    tokenizer = load_checkpoint(tmp_path / "a.pt")[1]
    assert tokenizer.special["<mask>"] == padded
    ids = json.loads((tmp_path / "exported" / "vocab.json").read_text(encoding="utf-8"))
    assert ids == json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    run(tmp_path / "exported", "--out", tmp_path / "b.pt")
    assert load_checkpoint(tmp_path / "b.pt")[1].state == tokenizer.state


# --- DiffuGPT, which is the same with its attention opened ---------------------------------------


@pytest.mark.parametrize(("more_rows", "mask"), [(1, "after the rest"), (2, "after the rest"), (0, "a token")])
@torch.no_grad()
def test_diffugpt_s_logits_are_those_of_the_reference_that_sees_all(
    more_rows, mask, merges, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(data.weights.gpt2, "SMALL_MASK", 300)
    reference = write_diffugpt(tmp_path / "model", merges[:200], more_rows)
    start, V = reference.config.bos_token_id, reference.config.vocab_size
    run(tmp_path / "model", "--out", tmp_path / "out.pt")
    model, tokenizer, _ = load_checkpoint(tmp_path / "out.pt")
    config = model.config
    assert config.mask_id == (300 if mask == "a token" else V - more_rows)
    assert (config.vocab_size, config.block, config.shift_id) == (V, None, start)
    assert config.context == SMALL_GPT2["n_positions"] - 1  # the start is read at a position of its own
    largest, text = 0.0, torch.arange(V) != config.mask_id
    for T in range(1, config.context + 1):
        ids = torch.randint(V, (3, T))
        read = torch.cat((torch.full((3, 1), start), ids), 1)  # (3, T + 1)
        theirs = reference(read, attention_mask=torch.zeros(3, 1, T + 1, T + 1)).logits[:, :T]
        largest = max(largest, (model(ids) - theirs)[..., text].abs().max().item())
    print(f"mask {mask}: the largest difference is {largest:.1e}")
    assert largest < 1e-4


def test_a_token_that_is_diffugpt_s_mask_is_written_with_shorter_ones(merges, run, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_diffugpt(folder, merges[:200], 0)
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    word = max(filter(str.isalpha, filter(str.isascii, ids)), key=len)
    monkeypatch.setattr(data.weights.gpt2, "SMALL_MASK", ids[word])
    run(folder, "--out", tmp_path / "out.pt")
    tokenizer = load_checkpoint(tmp_path / "out.pt")[1]
    assert tokenizer.mask_id == ids[word]
    assert ids[word] not in tokenizer.encode(f"{word} x")
    assert tokenizer.decode(tokenizer.encode(f"{word} x")) == f"{word} x"
    assert tokenizer.decode([ids[word]]) == "<mask>"


def test_a_diffugpt_samples_scores_and_shows(merges, run, use, tmp_path):
    write_diffugpt(tmp_path / "model", merges[:200], 1)
    run(tmp_path / "model", "--out", tmp_path / "out.pt")
    use(tmp_path / "out.pt")


# --- files ---------------------------------------------------------------------------------------


LAYOUTS = {
    "as transformers writes it": lambda tensors: tensors,
    "without the leading name": lambda tensors: renamed(tensors, r"^transformer\.", ""),
    "no head, which is tied": lambda tensors: without(tensors, "lm_head.weight"),
    "with buffers, as the oldest files": lambda tensors: {
        **renamed(tensors, r"^transformer\.", ""),
        **{f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril() for i in range(2)},
        **{f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names_gives_the_same_model(layout, original, expected, gpt2, run, tmp_path, capsys):
    save_weights(gpt2, LAYOUTS[layout](original[1].state_dict()))
    run(gpt2, "--out", tmp_path / "out.pt")
    model = load_checkpoint(tmp_path / "out.pt")[0]
    assert_equal(model.state_dict(), expected)
    assert model.head.weight is model.token_embedding.weight
    assert "not used" not in capsys.readouterr().out


def test_a_head_that_differs_from_the_embedding_is_its_own(original, gpt2, run, tmp_path):
    tensors = original[1].state_dict()
    save_weights(gpt2, tensors | {"lm_head.weight": 2 * tensors["lm_head.weight"]})
    run(gpt2, "--out", tmp_path / "out.pt")
    model = load_checkpoint(tmp_path / "out.pt")[0]
    assert not model.config.tied
    assert model.head.weight[:-1].equal(2 * model.token_embedding.weight[:-1])


def test_what_is_not_used_is_said(original, expected, gpt2, run, tmp_path, capsys):
    save_weights(gpt2, original[1].state_dict() | {"score.weight": torch.ones(2, 32)})
    run(gpt2, "--out", tmp_path / "out.pt")
    assert_equal(load_checkpoint(tmp_path / "out.pt")[0].state_dict(), expected)
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not used")]
    assert listed == ["not used: score.weight"]


# --- export --------------------------------------------------------------------------------------


EXPORTED = {
    "tied": {},
    "untied, other settings": {
        "tie_word_embeddings": False,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
        "n_inner": 48,
        "resid_pdrop": 0.25,
    },
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_the_original_for_transformers_and_for_us(name, merges, run, tmp_path):
    original, exported = tmp_path / "model", tmp_path / "exported"
    reference = write_gpt2(original, merges, **EXPORTED[name])
    save_weights(original, reference.state_dict())
    run(original, "--out", tmp_path / "a.pt")
    run(tmp_path / "a.pt", "--export", exported)
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == reference.config.tie_word_embeddings
    assert_equal(loaded.state_dict(), reference.state_dict())
    for setting in (*SMALL_GPT2, "activation_function", "layer_norm_epsilon", "resid_pdrop", "bos_token_id"):
        assert getattr(loaded.config, setting) == getattr(reference.config, setting)
    assert same_vocabulary(exported, original)
    ids = torch.randint(reference.config.vocab_size, (3, 24))
    with torch.no_grad():
        assert loaded.eval()(ids).logits.equal(reference(ids).logits)
    run(exported, "--out", tmp_path / "b.pt")
    (model, tokenizer, _), (again, tokenizer_again, _) = (load_checkpoint(tmp_path / path) for path in ("a.pt", "b.pt"))
    assert again.config == model.config
    assert tokenizer_again.state == tokenizer.state
    assert_equal(again.state_dict(), model.state_dict())
    drafts, _, _ = load_checkpoint(tmp_path / "a.pt", draft_len=4)
    save_checkpoint(tmp_path / "drafts.pt", drafts, tokenizer)
    run(tmp_path / "drafts.pt", "--export", tmp_path / "without-drafts")
    run(tmp_path / "without-drafts", "--out", tmp_path / "c.pt")
    assert_equal(load_checkpoint(tmp_path / "c.pt")[0].state_dict(), model.state_dict())


def test_an_exported_file_has_no_more_than_the_weights(checkpoint, original, run, tmp_path):
    run(checkpoint, "--export", tmp_path / "exported")
    tensors = torch.load(tmp_path / "exported" / "pytorch_model.bin", weights_only=True)
    assert_equal(tensors, without(original[1].state_dict(), "lm_head.weight"))
    for tensor in tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_only_a_gpt2_is_exported_and_only_to_a_folder_without_a_model(checkpoint, gpt2, mistake, tmp_path):
    _, tokenizer, _ = load_checkpoint(checkpoint)
    small = {"n_embd": 16, "n_layer": 1, "context": 16}
    tokens = {"vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id}
    own = {**small, **tokens, "special_ids": tokenizer.special_ids}
    save_checkpoint(tmp_path / "rope.pt", Transformer(ModelConfig(**own)), tokenizer)
    opened, _, _ = load_checkpoint(checkpoint, block=None, context=23)
    save_checkpoint(tmp_path / "opened.pt", opened, tokenizer)
    assert "only a RoBERTa, a BERT or a GPT-2" in mistake(tmp_path / "rope.pt", "--export", tmp_path / "new")
    assert "not a GPT-2 any more" in mistake(tmp_path / "opened.pt", "--export", tmp_path / "new")
    assert "in it already" in mistake(checkpoint, "--export", gpt2)
    assert "No such file" in mistake(tmp_path / "none.pt", "--export", tmp_path / "new")


# --- training ------------------------------------------------------------------------------------


def train_on_text(run, checkpoint, tmp_path, *flags):
    """Train a checkpoint on a little text with its own tokens; the path of what was trained."""
    (tmp_path / "novel.txt").write_text(library_text()[:20_000], encoding="utf-8")
    arguments = (tmp_path / "novel.txt", "--name", "novel", "--tokenizer", checkpoint)
    run(*arguments, main=text_prepare.main)
    out = ("--data", "novel", "--out_dir", tmp_path / "out", "--evals", 1, "--prompt_len", 0)
    run("--init_from", checkpoint, *flags, *out, main=train.main)
    return tmp_path / "out" / "ckpt.pt"


def test_a_gpt2_that_is_trained_further_is_exported(checkpoint, original, run, tmp_path):
    trained = train_on_text(run, checkpoint, tmp_path, "--max_iters", 3)
    run(trained, "--export", tmp_path / "exported")
    reference = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "exported").eval()
    model = load_checkpoint(trained)[0]
    assert largest_difference(model, reference, [24]) < 1e-4
    assert largest_difference(model, original[1], [24]) > 1e-3


def opening():
    """The flags of data/weights/README.md's line that opens GPT-2, without those that name files."""
    readme = (ROOT / "data" / "weights" / "README.md").read_text(encoding="utf-8")
    line = re.search(r"^python train.py (.*--attention.*)$", readme, re.MULTILINE)[1]
    return re.sub(r"--(init_from|data|out_dir) \S+", "", line).split()


def test_an_opened_gpt2_trains_and_writes_what_stands_between(checkpoint, run, mistake, tmp_path, capsys):
    flags = opening()
    longer = ("--init_from", checkpoint, *flags, "--context", 24, "--max_iters", 1)
    assert "at most 23 tokens" in mistake(*longer, main=train.main)
    trained = train_on_text(run, checkpoint, tmp_path, *flags, "--context", 23, "--max_iters", 4)
    model, tokenizer, checkpoint = load_checkpoint(trained)
    assert checkpoint["step"] == 4
    assert (model.config.block, model.config.context) == (None, 23)
    assert model.config.shift_id == tokenizer.first(START)
    ids = torch.randint(model.config.mask_id, (1, 23))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % model.config.mask_id
    assert not model(ids)[0, 0].equal(model(changed)[0, 0])  # the first sees the last
    capsys.readouterr()
    run("--ckpt", trained, "--prompt", "def <mask*9>:", main=sample.main)
    text = capsys.readouterr().out
    assert text.startswith("def")
    assert text.endswith(":\n")
    assert START not in text


# --- mistakes ------------------------------------------------------------------------------------


OTHER_CONFIGS = [
    ({"model_type": "t5"}, "t5"),
    ({"model_type": None}, "None"),
    ({"activation_function": "swiglu"}, "swiglu"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"n_head": 5}, "attention.query.weight"),
    ({"n_head": 0}, "don't make a model"),
    ({"n_embd": "768"}, "don't make a model"),
    ({"n_embd": None}, "it has no n_embd"),
    ({"n_inner": -1}, "don't make a model"),
    ({"n_inner": 100}, "layers.0.mlp.up"),
    ({"n_positions": 25}, "position_embedding"),
    ({"n_embd": 64}, "64]"),
    ({"n_layer": 3}, "layers.2."),
    ({"n_layer": 1}, "layers.1."),
    ({"vocab_size": 100}, "101 rows"),
    ({"vocab_size": 10**12}, "1,000,000,000,001 rows"),
]


@pytest.mark.parametrize(("changes", "reason"), OTHER_CONFIGS)
def test_a_config_that_is_of_another_model_is_refused_by_name(changes, reason, gpt2, mistake, tmp_path):
    edit(gpt2 / "config.json", **changes)
    assert reason in mistake(gpt2, "--out", tmp_path / "new" / "out.pt")


LAYER = "transformer.h.1.attn.c_attn.weight"
OTHER_WEIGHTS = {
    "an unknown tensor": (lambda t: t | {"transformer.adapter.weight": torch.ones(2)}, "adapter.weight"),
    "a layer too many": (lambda t: t | {LAYER.replace("1", "2"): t[LAYER]}, "layers.2.attention"),
    "a layer's tensor missing": (lambda t: without(t, LAYER), "layers.1.attention.query.weight"),
    "no embedding": (lambda t: without(t, "wte.weight"), "token_embedding.weight"),
    "another shape": (lambda t: t | {LAYER: t[LAYER].T}, "layers.1.attention.query.weight"),
    "another vocabulary": (
        lambda t: {k: v[:-1] if "wte" in k or "lm_head" in k else v for k, v in t.items()},
        "token_embedding.weight",
    ),
    "whole numbers": (lambda t: t | {LAYER: t[LAYER].long()}, "floating point"),
}


@pytest.mark.parametrize("change", OTHER_WEIGHTS)
def test_a_tensor_that_is_left_over_missing_or_of_another_shape_is_named(change, original, gpt2, mistake, tmp_path):
    alter, reason = OTHER_WEIGHTS[change]
    save_weights(gpt2, alter(original[1].state_dict()))
    assert reason in mistake(gpt2, "--out", tmp_path / "new" / "out.pt")


@pytest.mark.parametrize(("name", "reason"), [("<start>", f"no {START}"), ("<mask>", "no <|endof")])
def test_a_vocabulary_without_its_special_token(name, reason, gpt2, mistake, tmp_path):
    path = gpt2 / "vocab.json"
    path.write_text(path.read_text(encoding="utf-8").replace(START, name), encoding="utf-8")
    assert reason in mistake(gpt2, "--out", tmp_path / "new" / "out.pt")
