"""LLaDA: the logits of transformers' Llama with its attention open, and the tokens of `tokenizers`."""

import json
import shutil
import tracemalloc

import pytest
import torch
import transformers
from model_files import (
    assert_equal,
    edit,
    library_text,
    move_biases,
)
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data.llada.prepare as prepare
import sample
from data.lib.chat import Chat
from data.lib.checkpoint import save_checkpoint
from data.weights import hub
from data.weights.llada import Network
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")

# The fixtures of the other converter's tests, here of this one.

# How Llama 3 and its like cut text into words, but for single digits.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


# --- files as the hub has them -------------------------------------------------------------------


def make_tokenizer(text, n_merges):
    """A byte-level BPE with special tokens, as `tokenizers` has it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return tokenizer


@pytest.fixture(scope="session")
def their_tokenizer():
    return make_tokenizer(library_text()[:300_000], 1200)


def settings_of(tokenizer, width=32, layers=2, heads=4, kv_heads=None, inside=48, length=24, **more):
    """A config.json, with the names and what is fixed of the released ones."""
    n = tokenizer.get_vocab_size()
    names = {"d_model": width, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads or heads}
    names |= {"mlp_hidden_size": inside, "max_sequence_length": length, "vocab_size": n}
    names |= {"embedding_size": -(-n // 64) * 64, "mask_token_id": tokenizer.token_to_id("<|mdm_mask|>")}
    names |= {"eos_token_id": tokenizer.token_to_id("<|endoftext|>"), "weight_tying": False}
    fixed = {
        "model_type": "llada",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
    }
    fixed |= {
        "rope": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "include_bias": False,
        "alibi": False,
    }
    fixed |= {"multi_query_attention": None, "residual_dropout": 0.0, "scale_logits": False}
    return {**fixed, **names, **more}


def shapes_of(settings):
    """The shape of each of its tensors, by name."""
    C, M, V = settings["d_model"], settings["mlp_hidden_size"], settings["embedding_size"]
    kv = C // settings["n_heads"] * settings["n_kv_heads"]
    layer = {"attn_norm": (C,), "q_proj": (C, C), "k_proj": (kv, C), "v_proj": (kv, C), "attn_out": (C, C)}
    layer |= {"ff_norm": (C,), "ff_proj": (M, C), "up_proj": (M, C), "ff_out": (C, M)}
    shapes = {"wte": (V, C), "ln_f": (C,), "ff_out": (V, C)}
    for i in range(settings["n_layers"]):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    return {f"model.transformer.{name}.weight": shape for name, shape in shapes.items()}


NAMES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
OUTSIDE = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


def random_llama(settings):
    """transformers' Llama of such a shape, random; and its tensors with LLaDA's names."""
    config = transformers.LlamaConfig(
        vocab_size=settings["embedding_size"],
        hidden_size=settings["d_model"],
        intermediate_size=settings["mlp_hidden_size"],
        num_hidden_layers=settings["n_layers"],
        num_attention_heads=settings["n_heads"],
        num_key_value_heads=settings["n_kv_heads"],
        max_position_embeddings=settings["max_sequence_length"],
        rms_norm_eps=settings["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        hidden_act=settings["activation_type"],
        initializer_range=settings["d_model"] ** -0.5,
        tie_word_embeddings=settings["weight_tying"],
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    move_biases(model)
    tensors = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in OUTSIDE:
            tensors[f"model.transformer.{OUTSIDE[module]}.weight"] = tensor.clone()
        else:
            _, _, number, module = module.split(".", 3)
            tensors[f"model.transformer.blocks.{number}.{NAMES[module]}.weight"] = tensor.clone()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes_of(settings)
    return model, tensors


def write_llada(folder, tokenizer, **settings):
    """A folder with the files of a random LLaDA; the reference and its tensors."""
    folder.mkdir()
    settings = settings_of(tokenizer, **settings)
    model, tensors = random_llama(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = {"chat_template": TEMPLATE, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(chat))
    save_shards(folder, tensors)
    return model, tensors


def save_shards(folder, tensors, n=3):
    """The tensors in n files, and the index of them."""
    names, shard_of = list(tensors), {}
    for i in range(n):
        shard = f"model-{i + 1:05}-of-{n:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::n]}, folder / shard)
        shard_of |= dict.fromkeys(names[i::n], shard)
    index = {"metadata": {"total_size": 0}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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


def test_tokens_are_those_of_the_reference_and_hold_the_text(original, their_tokenizer, mixed_lines):
    folder = original[0]
    settings = prepare.read_config(folder / "config.json")
    tokenizer = hub.read_tokenizer_json(folder, settings["embedding_size"], settings["mask_token_id"])
    lines = [line for line in mixed_lines if not any(name in line for name in SPECIAL)]
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
    folder = original[0]
    settings = prepare.read_config(folder / "config.json")
    tokenizer = hub.read_tokenizer_json(folder, settings["embedding_size"], settings["mask_token_id"])
    text = "a <|eot_id|> b <|mdm_mask|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids)


def test_gpt2_s_own_cutting_is_known_too(their_tokenizer, original, tmp_path):
    folder = shutil.copytree(original[0], tmp_path / "model")
    theirs = Tokenizer.from_str(their_tokenizer.to_str())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.save(str(folder / "tokenizer.json"))
    settings = prepare.read_config(folder / "config.json")
    ours = hub.read_tokenizer_json(folder, settings["embedding_size"], settings["mask_token_id"])
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
    settings = prepare.read_config(llada / "config.json")
    tokenizer = hub.read_tokenizer_json(llada, settings["embedding_size"], settings["mask_token_id"])
    template, unused = prepare.read_chat(llada, tokenizer)
    assert unused == []
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=their_tokenizer, bos_token="<|startoftext|>")
    theirs.chat_template = TEMPLATE
    turns = [("user", " What is 2 + 2? "), ("assistant", "4."), ("user", "And 3?\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Chat(template, tokenizer).prompt(messages) == expected


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


def test_another_template_is_not_used_and_that_is_said(llada, run, tmp_path, capsys):
    edit(llada / "tokenizer_config.json", chat_template="{{ messages }}")
    run(llada, "--out", tmp_path / "llada.pt")
    assert "not used: the chat_template" in capsys.readouterr().out
    assert "chat" not in load_checkpoint(tmp_path / "llada.pt")[2]


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
    "biases": ({"include_bias": True}, "include_bias True"),
    "another norm": ({"layer_norm_type": "default"}, "layer_norm_type"),
    "no rotation": ({"rope": False}, "rope False"),
    "heads that do not share": ({"n_kv_heads": 3}, "n_kv_heads"),
    "layers without end": ({"n_layers": 10**6}, "1,000,000 layers"),
    "an activation of its own": ({"activation_type": "swiglu"}, "swiglu"),
    "rows without tokens": ({"embedding_size": 10**9}, "too few"),
    "tokens without rows": ({"embedding_size": 64}, "numbers below 64"),
    "another model": ({"model_type": "llama"}, "only llada"),
    "a base that rotates nothing": ({"rope_theta": 0}, "no model can be made"),
    "more positions than we take": ({"max_sequence_length": 10**8}, "no model can be made"),
    "an end that is the mask": ({"eos_token_id": 1460}, "no model can be made"),
    "an eps without end": ({"rms_norm_eps": float("inf")}, "no model can be made"),
}


@pytest.mark.parametrize("change", BROKEN)
def test_settings_of_no_such_model_are_refused_in_a_sentence(change, llada, mistake, tmp_path):
    changes, names = BROKEN[change]
    edit(llada / "config.json", **changes)
    assert names in mistake(llada, "--out", tmp_path / "out.pt")


def alter(llada, **changes):
    """Change parts of tokenizer.json."""
    edit(llada / "tokenizer.json", **changes)


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
        ({"pre_tokenizer": None}, "is not what"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "is not what"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [number, letters]}}, "is not what"),
        ({"added_tokens": [{"content": 5, "id": 5}]}, "is not what"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [bad, letters]}},
            "cuts no text into words",
        ),
        (
            {"model": {**whole["model"], "merges": [["日", "本"]], "vocab": {**vocab, "日本": 9999}}},
            "no '日本' of bytes",
        ),
        ({"model": {**whole["model"], "merges": [["q", "q"], *whole["model"]["merges"]]}}, "has no 'qq'"),
        ({"added_tokens": [{"content": "<|mdm_mask|>", "id": 5}]}, "different numbers"),
    ):
        (llada / "tokenizer.json").write_text(json.dumps({**whole, **changes}))
        assert names in mistake(llada, "--out", tmp_path / "out.pt"), changes


def test_shards_that_do_not_fit_their_index_are_refused_in_a_sentence(llada, mistake, tmp_path):
    index = llada / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(shard_of.items()))
    for weight_map, names in (
        ({**shard_of, name: "../config.json"}, "no name of a file"),
        ({**shard_of, name: "model-00009-of-00003.safetensors"}, "no model-00009"),
        ({**shard_of, "more.weight": shard}, "it has no more.weight"),
        ([shard], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert names in mistake(llada, "--out", tmp_path / "out.pt")


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"

    def write(header, content=b"\0" * 8, n=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((len(text) if n is None else n).to_bytes(8, "little") + text + content)
        return path

    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert hub.read_tensors(write({"w": whole}))["w"].equal(torch.zeros(2))
    empty = {**whole, "shape": [0, 2**40], "data_offsets": [8, 8]}
    assert hub.read_tensors(write({"w": empty}))["w"].numel() == 0
    tracemalloc.start()
    for header, *more in (
        ({"w": {**whole, "shape": [2**40], "data_offsets": [0, 2**42]}},),
        ({"w": {**whole, "shape": [-2], "data_offsets": [8, 0]}},),
        ({"w": {**whole, "shape": [-1]}},),
        ({"w": {**whole, "shape": [3]}},),
        ({"w": {**whole, "data_offsets": [4, 12]}},),
        ({"w": whole, "again": whole},),
        ({"w": {**whole, "dtype": "F4"}},),
        ({"w": {**whole, "shape": "ab"}},),
        ({"w": 3},),
        ([],),
        (b"{", b"\0" * 8, 2**60),
        (b"{", b"\0" * 8, 2**30),
        (b"{" * 10_000,),
        (b"", b"", 0),
    ):
        with pytest.raises(hub.Mistake):
            hub.read_tensors(write(header, *more))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24
