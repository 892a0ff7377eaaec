"""LLaDA: the logits of transformers' Llama with its attention open, and the tokens of `tokenizers`."""

import json
import shutil

import pytest
import torch
import transformers
from model_files import (
    LLADA_SPECIAL,
    LLADA_TEMPLATE,
    assert_equal,
    edit,
    library_text,
    make_tokenizer,
    save_shards,
    write_llada,
)
from tokenizers import Tokenizer, pre_tokenizers

import data.weights.llada
import data.weights.prepare
import sample
from data.lib.chat import Chat
from data.lib.checkpoint import save_checkpoint
from data.weights.llada import Network
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")

# --- files as the hub has them -------------------------------------------------------------------


@pytest.fixture(scope="session")
def their_tokenizer():
    return make_tokenizer(library_text()[:300_000], 1200)


@pytest.fixture(scope="session")
def original(their_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "llada"
    return folder, *write_llada(folder, their_tokenizer)


@pytest.fixture
def llada(original, tmp_path):
    """A copy of the small LLaDA's folder, for the test to change."""
    return shutil.copytree(original[0], tmp_path / "model")


# --- logits --------------------------------------------------------------------------------------


@torch.no_grad()
def largest_difference(model, reference, lengths):
    """The largest between the logits of random texts, but for that of `<mask>`."""
    torch.manual_seed(0)
    largest, text = 0.0, torch.arange(model.config.vocab_size) != model.config.mask_id
    for T in lengths:
        ids = torch.randint(model.config.vocab_size, (3, T))
        theirs = reference(ids, attention_mask=torch.zeros(3, 1, T, T)).logits  # 0 is added: all see all
        ours = model(ids)
        assert ours.dtype == torch.float32
        assert (ours[..., ~text] == -torch.inf).all()
        largest = max(largest, (ours - theirs)[..., text].abs().max().item())
    return largest


ODD = {
    "fewer heads of keys": {"width": 48, "layers": 3, "heads": 6, "kv_heads": 2, "inside": 50, "length": 31},
    "one head of keys": {"width": 40, "heads": 5, "kv_heads": 1, "inside": 33, "length": 9},
    "gelu, another base and eps": {"activation_type": "gelu", "rope_theta": 1234.0, "rms_norm_eps": 1e-2},
    "tied, one layer": {"layers": 1, "heads": 1, "weight_tying": True},
}


@pytest.mark.parametrize("name", ODD)
def test_logits_are_those_of_the_reference_at_every_length(name, their_tokenizer, run, tmp_path):
    reference, _ = write_llada(tmp_path / "odd", their_tokenizer, **ODD[name])
    run(tmp_path / "odd", "--out", tmp_path / "odd.pt")
    model = load_checkpoint(tmp_path / "odd.pt")[0]
    largest = largest_difference(model, reference, range(1, model.config.context + 1))
    print(f"{name}: the largest difference is {largest:.1e}")
    assert model.config.tied == (name == "tied, one layer")
    assert largest < 1e-4


@pytest.mark.slow
def test_logits_of_a_layer_of_the_real_width_are_those_of_the_reference(their_tokenizer, run, tmp_path):
    shape = {"width": 4096, "heads": 32, "layers": 1, "inside": 12288, "length": 64}
    reference, _ = write_llada(tmp_path / "wide", their_tokenizer, **shape)
    run(tmp_path / "wide", "--out", tmp_path / "wide.pt")
    largest = largest_difference(load_checkpoint(tmp_path / "wide.pt")[0], reference, [64])
    print(f"the largest difference is {largest:.1e}")
    assert largest < 1e-4


def test_half_the_heads_of_keys_are_those_of_all_where_pairs_are_alike():
    """Llama's sharing says nothing but this."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context": 16}
    shared, whole = (Network(Network.Config(n_kv_head=n, **shape)).eval() for n in (2, 4))
    tensors = shared.state_dict()
    for name, tensor in tensors.items():
        if ".key.weight" in name or ".value.weight" in name:
            tensors[name] = tensor.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(tensors)
    ids = torch.randint(257, (2, 16))
    torch.testing.assert_close(shared(ids), whole(ids))


# --- tokens --------------------------------------------------------------------------------------


def read_tokenizer(folder):
    """The settings and the tokenizer of a folder."""
    return json.loads((folder / "config.json").read_text()), data.weights.prepare.convert(folder)[1]


def test_tokens_are_those_of_the_reference_and_hold_the_text(original, their_tokenizer, mixed_lines):
    folder = original[0]
    settings, tokenizer = read_tokenizer(folder)
    lines = [line for line in mixed_lines if not any(name in line for name in LLADA_SPECIAL)]
    lines += ["I'M you'LL 'S", "1234567", "\r\n\r\n  x\n\n", " \t ", "don’t…!!\n", "", "日本語 हिन्दी 😀‍👩"]
    for line in lines:
        ids = tokenizer.encode(line)
        assert ids == their_tokenizer.encode(line).ids, line
        assert tokenizer.decode(ids) == line
    assert tokenizer.mask_id == their_tokenizer.token_to_id("<|mdm_mask|>")
    assert tokenizer.vocab_size == settings["embedding_size"]
    for name in ("<|startoftext|>", "<|endoftext|>", "<|eot_id|>"):
        assert tokenizer.special[name] == their_tokenizer.token_to_id(name)
    assert tokenizer.bos_id is None  # its [CLS] opens no line


def test_special_tokens_that_are_written_out_are_text(original, their_tokenizer):
    _, tokenizer = read_tokenizer(original[0])
    text = "a <|eot_id|> b <|mdm_mask|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids)


def test_gpt2_s_own_cutting_is_known_too(their_tokenizer, original, tmp_path):
    folder = shutil.copytree(original[0], tmp_path / "model")
    theirs = Tokenizer.from_str(their_tokenizer.to_str())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.save(str(folder / "tokenizer.json"))
    _, ours = read_tokenizer(folder)
    for line in ("I'M 1234567  x\n\n", " don't"):
        assert ours.encode(line) == theirs.encode(line).ids


# --- the command ---------------------------------------------------------------------------------


def test_files_become_a_checkpoint_that_samples_scores_and_shows(llada, original, run, use, tmp_path):
    run(llada, "--out", tmp_path / "llada.pt")
    model, tokenizer, checkpoint = load_checkpoint(tmp_path / "llada.pt")
    assert largest_difference(model, original[1], [24]) < 1e-4
    ends = tokenizer.special["<|endoftext|>"], tokenizer.special["<|eot_id|>"]
    assert model.config.end_ids == ends
    assert not set(ends) & set(model.config.special_ids)
    assert checkpoint["chat"]["opening"] == "<|startoftext|>"
    use(tmp_path / "llada.pt")


def test_a_conversation_is_that_of_the_reference_token_for_token(their_tokenizer, llada):
    """Its turns, and what opens the reply."""
    _, tokenizer = read_tokenizer(llada)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=their_tokenizer, bos_token="<|startoftext|>")
    theirs.chat_template = LLADA_TEMPLATE
    turns = [("user", " What is 2 + 2? "), ("assistant", "4."), ("user", "And 3?\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Chat(data.weights.llada.CHAT, tokenizer).prompt(messages) == expected


def test_chat_prints_the_reply_alone_up_to_the_end_of_its_turn(llada, original, run, tmp_path, capsys):
    run(llada, "--out", tmp_path / "llada.pt")
    model, tokenizer, checkpoint = load_checkpoint(tmp_path / "llada.pt")
    capsys.readouterr()
    flags = "--ckpt", tmp_path / "llada.pt", "--chat", "--prompt", "a", "--order", "left", "--seed", 3
    run(*flags, "--temperature", 0.3, "--dtype", "float32", main=sample.main)
    reply = capsys.readouterr().out.removesuffix("\n")
    canvas = torch.tensor([Chat(checkpoint["chat"], tokenizer).canvas([{"role": "user", "content": "a"}], 24)])
    n = int((canvas != tokenizer.mask_id).sum())
    *_, canvas = sample.denoise(model, canvas, order="left", seeds=[3], temperature=0.3)
    ids = canvas[0, n:].tolist()
    ends = [i for i, token in enumerate(ids) if token in model.config.end_ids]
    assert reply == tokenizer.decode(ids[: ends[0]] if ends else ids)
    model.config.end_ids = tuple({*range(model.config.vocab_size)} - {*model.config.special_ids})
    save_checkpoint(tmp_path / "ends.pt", model, tokenizer, chat=checkpoint["chat"])
    run("--ckpt", tmp_path / "ends.pt", *flags[2:], main=sample.main)
    assert capsys.readouterr().out == "\n"  # whatever is written ends it


def test_without_the_tokens_of_a_turn_there_is_no_conversation(llada, run, tmp_path):
    path = llada / "tokenizer.json"
    path.write_text(path.read_text().replace("<|eot_id|>", "<|other|>"))
    run(llada, "--out", tmp_path / "llada.pt")
    model, tokenizer, checkpoint = load_checkpoint(tmp_path / "llada.pt")
    assert "chat" not in checkpoint
    assert model.config.end_ids == (tokenizer.special["<|endoftext|>"],)


def test_a_checkpoint_has_the_files_dtype_and_loads_in_it_without_a_copy(llada, original, run, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in original[2].items()}
    save_shards(llada, half)
    run(llada, "--out", tmp_path / "llada.pt")
    model = load_checkpoint(tmp_path / "llada.pt", keep=torch.bfloat16)[0]
    stored = torch.load(tmp_path / "llada.pt", mmap=True)["model"]
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert_equal(model.state_dict(), stored)
    single = load_checkpoint(tmp_path / "llada.pt")[0]
    assert_equal(single.state_dict(), {name: tensor.float() for name, tensor in stored.items()})
    ids = torch.randint(1000, (2, 24))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        near, exact = model(ids).float(), single(ids).float()
    text = near.isfinite()
    assert (near - exact)[text].abs().max() < 0.1 * exact[text].std()


BROKEN = {
    "another norm": ({"layer_norm_type": "default"}, "layer_norm_type is default"),
    "no rotation": ({"rope": False}, "rope is False"),
    "scaled embeddings": ({"input_emb_norm": True}, "input_emb_norm is True"),
    "a setting that is missing": ({"rope_theta": None}, "it has no rope_theta"),
    "heads that do not share": ({"n_kv_heads": 3}, "n_kv_head must divide n_head"),
    "layers without end": ({"n_layers": 10**6}, "1,000,000 layers"),
    "an activation of its own": ({"activation_type": "swiglu"}, "swiglu"),
    "rows without tokens": ({"embedding_size": 10**9}, "1,000,000,000 rows"),
    "tokens without rows": ({"embedding_size": 64}, "64 rows"),
    "another model": ({"model_type": "t5"}, "model_type is t5"),
    "a base that rotates nothing": ({"rope_theta": 0}, "rope_base must be positive"),
    "more positions than we take": ({"max_sequence_length": 10**8}, "don't make a model"),
    "an eps without end": ({"rms_norm_eps": float("inf")}, "don't make a model"),
}


@pytest.mark.parametrize("change", BROKEN)
def test_settings_of_no_such_model_are_refused_in_a_sentence(change, llada, mistake, tmp_path):
    changes, names = BROKEN[change]
    edit(llada / "config.json", **changes)
    assert names in mistake(llada, "--out", tmp_path / "out.pt")


def test_tokenizers_that_are_none_of_ours_are_refused_in_a_sentence(llada, mistake, tmp_path):
    whole = json.loads((llada / "tokenizer.json").read_text())
    (split, letters), vocab = whole["pre_tokenizer"]["pretokenizers"], whole["model"]["vocab"]
    bad, number = ({**split, "pattern": {"Regex": regex}} for regex in ("(a", 5))
    for changes, names in (
        ({"model": {**whole["model"], "type": "Unigram"}}, "byte-level BPE"),
        ({"normalizer": {"type": "NFKC"}}, "byte-level BPE"),
        ({"model": {**whole["model"], "unk_token": "?"}}, "byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "byte-level BPE"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, split, letters]}}, "byte-level BPE"),
        ({"pre_tokenizer": None}, "byte-level BPE"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "don't make a model"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [number, letters]}}, "don't make a model"),
        ({"added_tokens": [{"content": 5, "id": 5}]}, "don't make a model"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [bad, letters]}}, "don't make a model"),
        ({"model": {**whole["model"], "merges": [["日", "本"]], "vocab": {**vocab, "日本": 9999}}}, "日"),
        ({"model": {**whole["model"], "merges": [["q", "q"], *whole["model"]["merges"]]}}, "'qq'"),
        ({"added_tokens": [{"content": "<|mdm_mask|>", "id": 5}]}, "don't make a model"),
    ):
        (llada / "tokenizer.json").write_text(json.dumps({**whole, **changes}))
        assert names in mistake(llada, "--out", tmp_path / "out.pt"), changes


def test_a_setting_that_tokenizers_assumes_is_assumed(llada):
    """Without `use_regex` words are cut by GPT-2's pattern."""
    edit(llada / "tokenizer.json", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True})
    text, reference = "They're 12 words,  and spaces\n\n", Tokenizer.from_file(str(llada / "tokenizer.json"))
    _, tokenizer, _, _ = data.weights.prepare.convert(llada)
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
