"""Made-up files of published models, and what it takes to run the commands on them."""

import json
import random
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data.lib.checkpoint
import data.lib.corpus
import data.text.prepare as text_prepare
import data.weights.prepare
import data.wikitext.prepare as wikitext_prepare
import sample
import train
from data.lib.errors import command

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
FIRST = ("<s>", "<pad>", "</s>", "<unk>")
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
PROTEINS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


def shape(width, layers, heads, inside, positions=26):
    """The settings that give a model its shape."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inside,
        "max_position_embeddings": positions,
    }


CLASSES = {
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
}


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """Everything is written to a folder of the test's own."""
    (tmp_path / "data").mkdir()
    for module in (data.lib.corpus, data.weights.prepare, wikitext_prepare):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run(monkeypatch):
    """Call a command's main with these arguments: by default that of data/weights/prepare.py."""

    def run(*arguments, main=data.weights.prepare.main, **more):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        main(**more)

    return run


@pytest.fixture
def mistake(run, tmp_path, capsys):
    """Call a command that must end in one sentence, with exit code 2 and no file changed; the sentence."""

    def mistake(*arguments, main=data.weights.prepare.main):
        capsys.readouterr()
        before = state_of(tmp_path)
        with pytest.raises(SystemExit) as ended:
            command(lambda: run(*arguments, main=main))
        captured = capsys.readouterr()
        assert (ended.value.code, captured.out) == (2, "")
        assert len(captured.err.strip().splitlines()) == 1, captured.err
        assert state_of(tmp_path) == before
        return captured.err

    return mistake


@pytest.fixture
def use(run, tmp_path, capsys):
    """Call every command with a checkpoint, and with no flag that names its model."""

    def use(path):
        capsys.readouterr()
        run("--ckpt", path, "--prompt", "def", "--watch", main=sample.main)
        assert capsys.readouterr().out.startswith("def")
        (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 2000)
        run("--ckpt", path, "--score", tmp_path / "text.txt", "--order", "left", main=sample.main)
        assert "nats per token" in capsys.readouterr().out
        run(tmp_path / "text.txt", "--name", "own", "--tokenizer", path, main=text_prepare.main)
        capsys.readouterr()
        run("--init_from", path, "--eval_only", "--data", "own", main=train.main)
        assert capsys.readouterr().out.startswith("own: NELBO")

    return use


def state_of(folder):
    """Everything below folder, files with their content."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def assert_equal(ours, theirs):
    """Assert that two dicts of tensors are the same to the bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].equal(theirs[name]), name


@pytest.fixture(scope="session")
def merges():
    """1,500 merges of a byte-level BPE, learned from the standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([library_text()[:500_000]], trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]


def library_text():
    paths = sorted(LIBRARY.glob("*.py"))
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def write_bpe(folder, merges, first=FIRST, last=("<mask>",)):
    """vocab.json and merges.txt; returns the number of tokens."""
    text = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    tokens = list(dict.fromkeys([*first, *text, *last]))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return len(tokens)


def random_model(kind, **settings):
    """transformers' model with random weights, those of the padding too."""
    config_class, model_class = CLASSES[kind]
    settings = shape(32, 2, 4, 48) | settings
    torch.manual_seed(0)
    model = model_class(config_class(initializer_range=settings["hidden_size"] ** -0.5, **settings)).eval()
    move_biases(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].normal_(std=model.config.initializer_range)
    return model


@torch.no_grad()
def move_biases(model):
    """Make no bias zero, and no norm without effect."""
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a bias, which was 0, or a norm's weight, which was 1
            parameter += 0.3 * torch.randn_like(parameter)


def write_roberta(folder, merges, first=FIRST, **settings):
    """A folder with the files of a random RoBERTa but its weights; returns its model."""
    folder.mkdir()
    vocab_size = write_bpe(folder, merges, first)
    settings = {"layer_norm_eps": 1e-5, "pad_token_id": first.index("<pad>"), **settings}
    model = random_model("roberta", vocab_size=vocab_size, **settings)
    model.config.save_pretrained(folder)
    return model


def write_bert(folder, tokens=PROTEINS, **settings):
    """A folder with the files of a random BERT but its weights; returns its model."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    pad = tokens.index("[PAD]")
    model = random_model("bert", vocab_size=len(tokens), pad_token_id=pad, **settings)
    model.config.save_pretrained(folder)
    return model


def save_weights(folder, tensors, **options):
    torch.save(tensors, folder / "pytorch_model.bin", **options)


def converted(folder, tensors=None):
    """Our model of the files in a folder, with these tensors if given."""
    if tensors is not None:
        save_weights(folder, tensors)
    return data.weights.prepare.convert(folder)[0]


@pytest.fixture(scope="session")
def originals(merges, tmp_path_factory):
    """A small RoBERTa and a small BERT, whole: the folder of each and its model."""
    folder = tmp_path_factory.mktemp("originals")
    found = {
        "roberta": write_roberta(folder / "roberta", merges[:200]),
        "bert": write_bert(folder / "bert"),
    }
    for kind, model in found.items():
        save_weights(folder / kind, model.state_dict())
    return {kind: (folder / kind, model) for kind, model in found.items()}


@pytest.fixture
def roberta(originals, tmp_path):
    """A copy of the small RoBERTa's folder, for the test to change."""
    return shutil.copytree(originals["roberta"][0], tmp_path / "model")


def edit(path, **changes):
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renamed(tensors, pattern, by):
    return {re.sub(pattern, by, name): tensor for name, tensor in tensors.items()}


def without(tensors, *ends):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


def same_vocabulary(a, b):
    """Whether two folders' vocab.json and merges.txt say the same."""
    ids = [json.loads((folder / "vocab.json").read_text(encoding="utf-8")) for folder in (a, b)]
    lines = [(folder / "merges.txt").read_text(encoding="utf-8").splitlines() for folder in (a, b)]
    return ids[0] == ids[1] and lines[0] == lines[1]


@pytest.fixture(scope="session")
def mixed_lines():
    """20,000 lines: code, prose, Unicode from every plane, control characters, long runs of spaces."""
    draw = random.Random(0)
    project = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("data/**/*.py"), *ROOT.glob("tests/*.py")]
    project = [line for path in sorted(project) for line in path.read_text(encoding="utf-8").splitlines(True)]
    lines = draw.choices(project, k=3000) + draw.sample(library_text().splitlines(True), 12000)
    for i in range(2500):
        points = draw.choices(range(i % 17 << 16, (i % 17 + 1) << 16), k=draw.randrange(1, 20))
        lines.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    controls = [chr(point) for point in (*range(32), *range(0x7F, 0xA1), 0x2028, 0xFEFF)]
    lines += ["".join(draw.choices([*controls, "a", "é", "7"], k=draw.randrange(1, 30))) for _ in range(1250)]
    spaces = [" ", " " * 17, " " * 300, "\t", "\n", "\r\n", "\u3000", "\xa0"]
    lines += ["".join(draw.choices([*spaces, "a", "It's", "漢"], k=draw.randrange(1, 20))) for _ in range(1250)]
    assert len(lines) == 20_000
    return lines


# --- GPT-2 ---------------------------------------------------------------------------------------

START = "<|endoftext|>"


def gpt2_shape(width, layers, heads, positions, inside=None):
    """The settings that give a model its shape."""
    names = "n_embd", "n_layer", "n_head", "n_positions", "n_inner"
    return dict(zip(names, (width, layers, heads, positions, inside)))


SMALL_GPT2 = gpt2_shape(32, 2, 4, 24)


def write_gpt2(folder, merges, **settings):
    """A folder with the files of a random GPT-2 but its weights; returns transformers' model of it."""
    folder.mkdir()
    vocab_size = write_bpe(folder, merges, first=(), last=(START,))
    start = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))[START]
    settings = {"vocab_size": vocab_size, "bos_token_id": start, "eos_token_id": start, **SMALL_GPT2, **settings}
    torch.manual_seed(0)
    config = transformers.GPT2Config(initializer_range=settings["n_embd"] ** -0.5, **settings)
    model = transformers.GPT2LMHeadModel(config).eval()
    move_biases(model)
    config.save_pretrained(folder)
    return model


def write_diffugpt(folder, merges, more_rows):
    """A folder with the files of a random DiffuGPT whose table has more_rows than its vocabulary; the
    reference, transformers' GPT-2, which is to see all.
    """
    write_gpt2(folder, merges)
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    rows = config["vocab_size"] + more_rows  # which config.json does not say
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**config, "vocab_size": rows}, attn_implementation="eager")
    ).eval()
    move_biases(reference)
    tensors = renamed(reference.state_dict(), r"^transformer\.wte", "embed_tokens")
    tensors = without(renamed(tensors, r"^transformer", "denoise_model"), "lm_head.weight")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return reference


# --- MDLM ----------------------------------------------------------------------------------------


def mdlm_settings(kind="mdlm", width=32, layers=2, heads=4, length=24, vocab_size=300, **more):
    """A config.json, with the names of the released ones."""
    names = {"vocab_size": vocab_size, "model_length": length, "hidden_dim": width, "cond_dim": 16}
    names |= {"n_blocks": layers, "n_heads": heads, "dropout": 0.1, "time_conditioning": False}
    return {"model_type": kind, **names, **more}


def mdlm_tensors(settings, adaln=True):
    """Tensors of the released names and shapes, none of which is zero or without effect."""
    C, V, L = settings["hidden_dim"], settings["vocab_size"], settings["cond_dim"]
    shapes = {"vocab_embed.embedding": (V, C), "output_layer.norm_final.weight": (C,)}
    shapes |= {"output_layer.linear.weight": (V, C), "output_layer.linear.bias": (V,)}
    told = {
        "output_layer.adaLN_modulation": (2 * C, L),
        "sigma_map.mlp.0": (L, 256),
        "sigma_map.mlp.2": (L, L),
    }
    for i in range(settings["n_blocks"]):
        layer = {"norm1.weight": (C,), "attn_qkv.weight": (3 * C, C), "attn_out.weight": (C, C)}
        layer |= {"norm2.weight": (C,), "mlp.0.weight": (4 * C, C), "mlp.0.bias": (4 * C,)}
        layer |= {"mlp.2.weight": (C, 4 * C), "mlp.2.bias": (C,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
        told[f"blocks.{i}.adaLN_modulation"] = 6 * C, L
    for name, shape in told.items() if adaln else ():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    torch.manual_seed(0)
    tensors = {f"backbone.{name}": torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    tensors |= {name: 1 + 0.3 * torch.randn(t.shape) for name, t in tensors.items() if "norm" in name}
    return tensors | {"backbone.rotary_emb.inv_freq": torch.ones(C // settings["n_heads"] // 2)}


def write_mdlm(folder, settings, tensors, merges):
    """A folder as the hub has it, beside GPT-2's vocabulary; settings with the number of its tokens."""
    folder.mkdir()
    settings = {**settings, "vocab_size": write_bpe(folder, merges, first=(), last=(START,)) + 1}
    tensors = mdlm_tensors(settings, settings.get("adaln", True)) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return settings, tensors


# --- LLaDA ---------------------------------------------------------------------------------------

# How Llama 3 and its like cut text into words, but for single digits.
LLADA_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLADA_WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLADA_SPECIAL = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>"]
LLADA_SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_tokenizer(text, n_merges):
    """A byte-level BPE with special tokens, as `tokenizers` has it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLADA_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in LLADA_SPECIAL])
    return tokenizer


def llada_settings(tokenizer, width=32, layers=2, heads=4, kv_heads=None, inside=48, length=24, **more):
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


def llada_shapes(settings):
    """The shape of each of its tensors, by name."""
    C, M, V = settings["d_model"], settings["mlp_hidden_size"], settings["embedding_size"]
    kv = C // settings["n_heads"] * settings["n_kv_heads"]
    layer = {"attn_norm": (C,), "q_proj": (C, C), "k_proj": (kv, C), "v_proj": (kv, C), "attn_out": (C, C)}
    layer |= {"ff_norm": (C,), "ff_proj": (M, C), "up_proj": (M, C), "ff_out": (C, M)}
    shapes = {"wte": (V, C), "ln_f": (C,), "ff_out": (V, C)}
    for i in range(settings["n_layers"]):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    return {f"model.transformer.{name}.weight": shape for name, shape in shapes.items()}


LLADA_NAMES = {
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
LLADA_OUTSIDE = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


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
        if module in LLADA_OUTSIDE:
            tensors[f"model.transformer.{LLADA_OUTSIDE[module]}.weight"] = tensor.clone()
        else:
            _, _, number, module = module.split(".", 3)
            tensors[f"model.transformer.blocks.{number}.{LLADA_NAMES[module]}.weight"] = tensor.clone()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == llada_shapes(settings)
    return model, tensors


def write_llada(folder, tokenizer, **settings):
    """A folder with the files of a random LLaDA; the reference and its tensors."""
    folder.mkdir()
    settings = llada_settings(tokenizer, **settings)
    model, tensors = random_llama(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer.save(str(folder / "tokenizer.json"))
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
