"""Llama, Qwen3 and TinyLlama: the logits and the greedy text of transformers, and the tokens of `tokenizers`."""

import itertools
import json
import unicodedata

import pytest
import regex
import torch
import transformers
from model_files import LLADA_WORDS, edit, library_text, move_biases, save_shards
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data.weights.prepare
import sample
from data.lib.chat import Chat
from data.lib.prompt import make_canvas
from data.weights.hub import DIGITS_PATTERN, GPT2_PATTERN
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")

SPECIAL = dict.fromkeys(("llama", "qwen3"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"])
SPECIAL["tinyllama"] = ["<unk>", "<s>", "</s>"]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}" + CHATML
FIRST = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
TEMPLATES = {"llama": "{% for message in messages %}" + FIRST + "{% endif %}" + CHATML}
TEMPLATES["qwen3"] = "{% for message in messages %}" + CHATML  # it has no message of its own
ROLE = "{% ROLE message['role'] == 'NAME' %}\n{{ '<|NAME|>\n' + message['content'] + eos_token }}\n"
ROLES = zip(("if", "elif", "elif"), ("user", "system", "assistant"))
ROLES = "".join(ROLE.replace("ROLE", test).replace("NAME", name) for test, name in ROLES)
TEMPLATES["tinyllama"] = "{% for message in messages %}\n" + ROLES + "{% endif %}\n"
TEMPLATES["tinyllama"] += (
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CLASSES = dict.fromkeys(("llama", "tinyllama"), (transformers.LlamaConfig, transformers.LlamaForCausalLM))
CLASSES["qwen3"] = transformers.Qwen3Config, transformers.Qwen3ForCausalLM


# --- files as the hub has them -------------------------------------------------------------------


def make_tokenizer(kind, text):
    """A byte-level BPE as SmolLM2 has it, whose vocabulary lacks a few bytes, or as Qwen3 has it; or TinyLlama's."""
    if kind == "tinyllama":
        return make_sentencepiece(text)
    tokenizer = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "llama")
    split = pre_tokenizers.Digits(True) if kind == "llama" else pre_tokenizers.Split(Regex(LLADA_WORDS), "isolated")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, letters]), decoders.ByteLevel()
    if kind == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    absent = {"Ć", "ć", "ÿ"} if kind == "llama" else set()  # of the bytes 6, 7 and 255
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - absent)
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL[kind]])
    if kind == "qwen3":
        tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


def make_sentencepiece(text):
    """As TinyLlama has it: the special tokens, the bytes, what merges make, and the characters that merge."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = Tokenizer(models.BPE())
    words.normalizer, words.pre_tokenizer = normalizer, pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[], show_progress=False)
    words.train_from_iterator(["é 日本 😀", *text.split("\n")], trainer)
    model = json.loads(words.to_str())["model"]
    names = [*SPECIAL["tinyllama"], *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(model["vocab"], key=lambda name: (len(name) == 1, model["vocab"][name]))
    pairs = [tuple(pair) for pair in model["merges"]]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL["tinyllama"]])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers():
    return {kind: make_tokenizer(kind, library_text()[:200_000]) for kind in CLASSES}


def write_llama(folder, tokenizer, kind="llama", more_rows=0, width=32, heads=4, template=True, **more):
    """A folder with the files of a random Llama, Qwen3 or TinyLlama; transformers' model of it, the reference."""
    folder.mkdir()
    starts = {"llama": "<|im_start|>", "qwen3": "<|endoftext|>", "tinyllama": "<s>"}
    bos, eos = starts[kind], "</s>" if kind == "tinyllama" else "<|im_end|>"
    settings = {"vocab_size": tokenizer.get_vocab_size() + more_rows, "hidden_size": width, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": heads, "num_key_value_heads": 2, "intermediate_size": 48, "hidden_act": "silu"}
    settings |= {
        "max_position_embeddings": 24,
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    settings |= {"bos_token_id": tokenizer.token_to_id(bos), "eos_token_id": tokenizer.token_to_id(eos)}
    settings |= {"head_dim": 10} if kind == "qwen3" else {}
    settings |= more
    base = settings.pop("rope_theta", 100_000)
    config_class, model_class = CLASSES[kind]
    config = config_class(
        **settings, rope_parameters={"rope_type": "default", "rope_theta": base}, initializer_range=width**-0.5
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    move_biases(model)
    settings["model_type"] = "qwen3" if kind == "qwen3" else "llama"
    older, newer = {"rope_theta": base, "rope_scaling": None}, {"rope_parameters": config.rope_parameters}
    named = {**settings, **(newer if kind == "qwen3" else older)}
    (folder / "config.json").write_text(json.dumps(named))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES[kind]} if template else {}))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if settings["tie_word_embeddings"]:
        del tensors["lm_head.weight"]  # as in the released files
    save_shards(folder, tensors)
    return model


def read(folder):
    """The model, the tokenizer and the chat template of a folder."""
    model, tokenizer, _, more = data.weights.prepare.convert(folder)
    return model, tokenizer, more.get("chat")


# --- logits --------------------------------------------------------------------------------------


def after_start(ids, model):
    """Ids (B, T) as the reference reads them, after the token that a shift puts in front."""
    return torch.cat((torch.full_like(ids[:, :1], model.config.shift_id), ids), 1)


@torch.no_grad()
def largest_difference(model, reference):
    """The largest between the logits of random texts of every length."""
    torch.manual_seed(0)
    V, largest = reference.config.vocab_size, 0.0
    text = torch.arange(V) != model.config.mask_id
    for T in range(1, model.config.context):
        ids = torch.randint(V, (3, T))
        theirs = reference(after_start(ids, model)).logits[:, :-1]
        largest = max(largest, (model(ids)[..., :V] - theirs)[..., text].abs().max().item())
    return largest


ODD = {
    "llama": {},
    "llama: one head of keys, untied, gelu": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
    },
    "llama: another base and eps, rows without tokens": {"rope_theta": 1234.0, "rms_norm_eps": 1e-2, "more_rows": 5},
    "qwen3": {"more_rows": 5},
    "qwen3: wide heads, untied": {"head_dim": 32, "tie_word_embeddings": False, "heads": 2},
}


@pytest.mark.parametrize("name", ODD)
def test_logits_are_those_of_the_reference_at_every_length(name, tokenizers, run, tmp_path):
    kind = name.split(":")[0]
    reference = write_llama(tmp_path / "odd", tokenizers[kind], kind, **ODD[name])
    run(tmp_path / "odd", "--out", tmp_path / "odd.pt")
    model = load_checkpoint(tmp_path / "odd.pt")[0]
    largest = largest_difference(model, reference)
    print(f"{name}: the largest difference is {largest:.1e}")
    assert model.config.tied == ("untied" not in name)
    assert largest < 1e-4


@pytest.mark.parametrize("kind", CLASSES)
def test_greedy_text_is_the_reference_s(kind, tokenizers, tmp_path):
    reference = write_llama(tmp_path / "model", tokenizers[kind], kind)
    model, tokenizer, _ = read(tmp_path / "model")
    reference.generation_config.suppress_tokens = [i for i in model.config.special_ids if i != model.config.mask_id]
    ids = torch.tensor([tokenizer.encode("def f(")])
    start = after_start(ids, model)
    theirs = reference.generate(start, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 1:]
    canvas = torch.cat((ids, torch.full((1, 10), model.config.mask_id)), 1)
    *_, ours = sample.denoise(model, canvas, order="left", temperature=0)
    assert ours[0].tolist() == theirs.tolist()


def test_a_row_without_a_token_is_the_mask_and_else_the_vocabulary_grows_by_one(tokenizers, tmp_path):
    n = tokenizers["llama"].get_vocab_size()
    write_llama(tmp_path / "full", tokenizers["llama"])
    model, tokenizer, _ = read(tmp_path / "full")
    assert (tokenizer.vocab_size, model.config.mask_id) == (n + 1, n)
    rows = model.token_embedding.weight
    torch.testing.assert_close(rows[n], rows[:n].mean(0))
    write_llama(tmp_path / "rounded", tokenizers["llama"], more_rows=3)
    model, tokenizer, _ = read(tmp_path / "rounded")
    assert (tokenizer.vocab_size, model.config.mask_id) == (n + 3, n + 2)
    assert {n, n + 1, n + 2} <= {*model.config.special_ids}


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_tokens_are_those_of_the_reference(kind, tokenizers, mixed_lines, tmp_path):
    write_llama(tmp_path / "model", tokenizers[kind], kind)
    _, tokenizer, _ = read(tmp_path / "model")
    lines = [line for line in mixed_lines if not any(name in line for name in [*SPECIAL[kind], "<think>"])]
    absent = {"\x06", "\x07"} if kind == "llama" else set()  # `tokenizers` may merge what stands on both sides of these
    lines = [line for line in lines if not absent & {*line} and all(unicodedata.category(c) != "Cn" for c in line)]
    lines += [
        "I'M you'LL 'S",
        "a  1234567  b",
        " 1 ½ Ⅷ ٣",
        "x\r\n\r\n  1\n\n",
        "e\u0301 \u1100\u1161 \u212b",
        "",
        " ▁ é",
        "日 国🫠",
    ]
    for line in lines:
        assert tokenizer.encode(line) == tokenizers[kind].encode(line).ids, line
    assert len(lines) > 15_000


def test_one_pattern_cuts_as_single_digits_and_then_gpt2_s_does():
    """For every text of up to six of these characters."""
    for n in range(7):
        for text in map("".join, itertools.product("1a's \n!", repeat=n)):
            parts = regex.split(r"(\p{N})", text)
            expected = [word for part in parts for word in regex.findall(GPT2_PATTERN, part)]
            assert regex.findall(DIGITS_PATTERN, text) == expected, repr(text)


def test_a_byte_that_the_vocabulary_lacks_is_left_out_as_by_the_reference(tokenizers, tmp_path):
    write_llama(tmp_path / "model", tokenizers["llama"])
    _, tokenizer, _ = read(tmp_path / "model")
    for text in ("a\x06b", "\x07", "x \x06\x07 y"):
        ids = tokenizer.encode(text)
        assert ids == tokenizers["llama"].encode(text).ids
        assert tokenizer.decode(ids) == text.replace("\x06", "").replace("\x07", "")


def test_added_tokens_that_are_not_special_are_written_and_shown(tokenizers, tmp_path):
    write_llama(tmp_path / "model", tokenizers["qwen3"], "qwen3")
    model, tokenizer, _ = read(tmp_path / "model")
    think = tokenizers["qwen3"].token_to_id("<think>")
    assert think not in model.config.special_ids
    assert tokenizer.decode([think]) == "<think>"
    assert think not in tokenizer.encode("<think>")  # a prompt is text


def test_a_text_around_holes_has_no_space_that_was_not_typed(tokenizers, tmp_path):
    """Sentencepiece puts one before every text, but what follows a hole only goes on."""
    write_llama(tmp_path / "model", tokenizers["tinyllama"], "tinyllama")
    _, tokenizer, _ = read(tmp_path / "model")
    word = tokenizer.encode("of")[0]  # with a space before it

    def filled(prompt, suffix=""):
        canvas = make_canvas(prompt, suffix, None, tokenizer, 40)
        return tokenizer.decode([word if i == tokenizer.mask_id else i for i in canvas])

    assert filled("Once <mask> a time", " or two") == "Once of a time or two"
    assert filled("Sing<mask>\n<mask>ing", ".") == "Sing of\n ofing."
    assert tokenizer.decode(tokenizer.encode("  x\n y")) == "  x\n y"


def test_tokens_that_were_added_to_sentencepiece_s_are_special_and_an_old_file_needs_no_base(tokenizers, tmp_path):
    write_llama(tmp_path / "model", tokenizers["tinyllama"], "tinyllama", more_rows=2, rope_theta=10000.0)
    path, n = tmp_path / "model" / "tokenizer.json", tokenizers["tinyllama"].get_vocab_size()
    edit(path, added_tokens=[*json.loads(path.read_text())["added_tokens"], {"content": "<|im_end|>", "id": n}])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["rope_theta"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model, tokenizer, _ = read(tmp_path / "model")
    assert (tokenizer.special["<|im_end|>"], model.config.mask_id, model.config.rope_base) == (n, n + 1, 10000.0)
    assert n in model.config.end_ids


# --- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_a_conversation_is_that_of_the_reference_token_for_token(kind, tokenizers, tmp_path):
    write_llama(tmp_path / "model", tokenizers[kind], kind)
    model, tokenizer, chat = read(tmp_path / "model")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers[kind])
    theirs.chat_template, theirs.eos_token = TEMPLATES[kind], SPECIAL[kind][2]
    turns = [("user", "What is 2 + 2?"), ("assistant", "4."), ("user", "And 3?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    start = [model.config.shift_id] if kind == "llama" else []  # this one opens the first turn
    assert start + Chat(chat, tokenizer).prompt(messages) == expected
    names = "<|endoftext|>", "<|im_end|>"  # TinyLlama's </s> is our <|endoftext|>
    ends = {tokenizer.special[name] for name in names if name in tokenizer.special}
    assert {*model.config.end_ids} == ends
    assert not ends & {*model.config.special_ids}


def test_a_reply_has_the_tokens_that_it_has_inside_a_conversation(tokenizers, tmp_path):
    write_llama(tmp_path / "model", tokenizers["tinyllama"], "tinyllama")
    _, tokenizer, template = read(tmp_path / "model")
    chat = Chat(template, tokenizer)
    turns = [{"role": "user", "content": "Sing!"}, {"role": "assistant", "content": "la la"}]
    whole = chat.prompt([*turns, turns[0]])
    reply = chat.prompt(turns[:1]) + chat.reply("la la")
    assert whole[: len(reply)] == reply


def test_without_a_template_there_is_no_conversation(tokenizers, tmp_path):
    write_llama(tmp_path / "model", tokenizers["llama"], template=False)
    assert read(tmp_path / "model")[2] is None


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_files_become_a_checkpoint_that_samples_chats_judges_and_scores(kind, tokenizers, run, tmp_path, capsys):
    write_llama(tmp_path / "model", tokenizers[kind], kind, max_position_embeddings=96)
    run(tmp_path / "model", "--out", tmp_path / "llama.pt")
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 20)
    flags = "--ckpt", tmp_path / "llama.pt", "--dtype", "float32"
    capsys.readouterr()
    run(*flags, "--prompt", "def", "--length", 20, "--judge", tmp_path / "llama.pt", main=sample.main)
    written = capsys.readouterr()
    assert written.out.startswith("def")
    assert "nats" in written.err
    run(*flags, "--prompt", "def", "--chat", main=sample.main)
    run(*flags, "--score", tmp_path / "text.txt", main=sample.main)
    assert "nats per token" in capsys.readouterr().out


BROKEN = {
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "biases inside": ({"mlp_bias": True}, "mlp_bias is True"),
    "scaled positions": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is"),
    "scaled in newer files": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is yarn"),
    "a sliding window": ({"use_sliding_window": True}, "use_sliding_window is True"),
    "a setting that is missing": ({"rope_theta": None}, "it has no rope_theta"),
    "heads that do not share": ({"num_key_value_heads": 3}, "n_kv_head must divide n_head"),
    "an odd head": ({"head_dim": 9}, "head_dim even"),
    "an activation of its own": ({"hidden_act": "swiglu"}, "swiglu"),
    "normalised queries": ({"model_type": "qwen3"}, "query_norm"),
    "rows without end": ({"vocab_size": 10**9}, "1,000,000,000 rows"),
    "another model": ({"model_type": "t5"}, "model_type is t5"),
}


@pytest.mark.parametrize("change", BROKEN)
def test_settings_of_no_such_model_are_refused_in_a_sentence(change, tokenizers, mistake, tmp_path):
    changes, names = BROKEN[change]
    write_llama(tmp_path / "model", tokenizers["llama"])
    edit(tmp_path / "model" / "config.json", **changes)
    assert names in mistake(tmp_path / "model", "--out", tmp_path / "out.pt")


def test_a_vocabulary_whose_words_go_on_after_a_space_is_refused_in_a_sentence(tokenizers, mistake, tmp_path):
    write_llama(tmp_path / "model", tokenizers["tinyllama"], "tinyllama")
    path = tmp_path / "model" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    vocab, merges = {**model["vocab"], "e▁": len(model["vocab"])}, [*model["merges"], ["e", "▁"]]
    edit(path, model={**model, "vocab": vocab, "merges": merges})
    assert "its token 'e▁' goes on after a space" in mistake(tmp_path / "model", "--out", tmp_path / "out.pt")
