"""The files of published models: what is missing, damaged or hostile, their vocabularies, and their downloads."""

import json
import math
import os
import pickle
import random
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from model_files import (
    FIRST,
    assert_equal,
    converted,
    edit,
    library_text,
    make_tokenizer,
    same_vocabulary,
    save_weights,
    write_bpe,
    write_llada,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import tiny_model

import data.lib.checkpoint
import sample
from data.lib.checkpoint import FAMILIES, published_network, save_checkpoint
from data.lib.errors import Mistake
from data.lib.tokenizer import ByteTokenizer
from data.weights import hub, prepare
from data.weights.hub import bpe_texts, bpe_tokenizer, read_bpe
from model import Transformer, load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def expected(originals):
    """Our tensors of the small RoBERTa."""
    return converted(originals["roberta"][0]).state_dict()


def save_as(form, folder, tensors):
    """Write a folder's weights in one of the forms that the hub has; the path of one file of them."""
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save = {"bin": torch.save, "safetensors": save_file}
    if form == "legacy":
        save_weights(folder, tensors, _use_new_zipfile_serialization=False)
        return folder / "pytorch_model.bin"
    kind, _, shards = form.partition(" in ")
    name = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[kind]
    if not shards:
        save[kind](tensors, folder / name)
        return folder / name
    weight_map = {key: f"{Path(name).stem}-{i % 3}.{kind}" for i, key in enumerate(tensors)}
    for shard in {*weight_map.values()}:
        save[kind]({key: tensors[key] for key in tensors if weight_map[key] == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / shard


FORMS = ["bin", "legacy", "safetensors", "bin in shards", "safetensors in shards"]


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_in_every_form_that_the_hub_has(form, originals, roberta, expected):
    save_as(form, roberta, originals["roberta"][1].state_dict())
    assert_equal(converted(roberta).state_dict(), expected)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("form", FORMS)
def test_truncated_weights_are_refused(form, share, originals, roberta, mistake, tmp_path):
    path = save_as(form, roberta, originals["roberta"][1].state_dict())
    os.truncate(path, int(path.stat().st_size * share))
    assert path.name in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


def test_a_flipped_bit_in_a_tensor_is_found(originals, roberta, mistake, tmp_path):
    path = save_as("bin", roberta, originals["roberta"][1].state_dict())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
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
    assert str(roberta) in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


def test_a_source_that_is_nothing_we_know(mistake, tmp_path):
    sentence = mistake(tmp_path / "none")
    assert all(name in sentence for name in ("roberta-base", "gpt2-medium", "mdlm-owt", "llada-8b-base"))


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
        ({"w": {**whole, "shape": [3]}},),
        ({"w": {**whole, "data_offsets": [4, 12]}},),
        ({name: {**whole, "shape": [1024], "data_offsets": [0, 4096]} for name in "abcd"}, b"\0" * 4096),
        ({"w": {**whole, "dtype": "F4"}},),
        ({"w": {**whole, "shape": "ab"}},),
        ({"w": 3},),
        ([],),
        (b"{", b"\0" * 8, 2**60),
        (b"{", b"\0" * 8, 2**30),
        (b"{" * 10_000,),
        (b"", b"", 0),
    ):
        with pytest.raises(Mistake):
            hub.read_tensors(write(header, *more))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


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
    assert name in mistake(folder, "--out", tmp_path / "new" / "out.pt")


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
        assert "don't make a model" in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_truncated_merges(cut, roberta, mistake, tmp_path):
    path = roberta / "merges.txt"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("\n", len(text) // 2) + 1 - cut], encoding="utf-8")
    assert "merges.txt" in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


@pytest.mark.parametrize("i", [None, 5000, -1, 0, 1.5, "x", 10**30])
def test_a_vocabulary_whose_ids_are_not_all_numbers_from_0_on(i, roberta, mistake, tmp_path):
    edit(roberta / "vocab.json", **{"<unk>": i})
    assert str(roberta) in mistake(roberta, "--out", tmp_path / "new" / "out.pt")


def test_sizes_that_no_model_has_are_refused(roberta, mistake):
    edit(roberta / "config.json", num_hidden_layers=10**6)
    assert "1,000,000 layers" in mistake(roberta)


# --- downloads -----------------------------------------------------------------------------------


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A stand-in for the network: folder has the files that it serves; asked lists (repository, name)."""
    folder, asked = tmp_path / "www", []

    def download(url, path, instead, most):
        repository, name = url.removeprefix(f"{hub.HUB}/").split("/resolve/main/")
        if path.exists():
            return
        asked.append((repository, name))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, path)

    monkeypatch.setattr(hub, "download", download)
    return folder, asked


FILES = ["config.json", "vocab.json", "merges.txt", "pytorch_model.bin"]


def test_a_name_is_downloaded_once(downloads, originals, expected, run, data_folder, tmp_path):
    folder, asked = downloads
    shutil.copytree(originals["roberta"][0], folder)
    run("RoBERTa-base")
    assert asked == [("FacebookAI/roberta-base", name) for name in FILES]
    assert_equal(load_checkpoint(data_folder / "weights" / "roberta-base.pt")[0].state_dict(), expected)
    assert sorted(path.name for path in (data_folder / "weights" / "roberta-base").iterdir()) == sorted(FILES)
    run("roberta-base", "--out", tmp_path / "again.pt")
    assert len(asked) == 4
    assert_equal(load_checkpoint(tmp_path / "again.pt")[0].state_dict(), expected)
    run("roberta-base", "--export", tmp_path / "exported")
    assert same_vocabulary(tmp_path / "exported", folder)


def test_an_index_is_followed_to_its_shards(downloads, run, data_folder):
    folder, asked = downloads
    write_llada(folder, make_tokenizer(library_text()[:10_000], 50))
    run("LLaDA-8B-Base")
    files = ["config.json", "tokenizer.json", "model.safetensors.index.json"]
    files += [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert asked == [("GSAI-ML/LLaDA-8B-Base", name) for name in files]
    assert load_checkpoint(data_folder / "weights" / "llada-8b-base.pt")[0].family == "llada"


def test_an_index_names_files_of_weights_next_to_it(downloads, monkeypatch, mistake):
    folder, asked = downloads
    write_llada(folder, make_tokenizer("a book of few words", 10))
    monkeypatch.setattr("model_files.state_of", lambda folder: None)  # what was downloaded stays
    for name in ("../config.json", "config.json", "../model-9.safetensors", "/model.bin", "model.bin\n", 3):
        index = json.dumps({"weight_map": {"a": name}})
        (folder / "model.safetensors.index.json").write_text(index)
        (prepare.DATA / "weights" / "llada-8b-base" / "model.safetensors.index.json").unlink(missing_ok=True)
        assert ("is not the name" if name != 3 else "don't make a model") in mistake("llada-8b-base")
    (prepare.DATA / "weights" / "llada-8b-base" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "don't make a model" in mistake("llada-8b-base")
    assert {name for _, name in asked} == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


def test_every_name_has_its_repository():
    named = {name: [*repositories] for name, repositories in prepare.REPOSITORIES.items()}
    assert named["distilroberta-base"] == ["distilbert/distilroberta-base"]
    assert named["gpt2-xl"] == ["openai-community/gpt2-xl"]
    assert named["distilgpt2"] == ["distilbert/distilgpt2"]
    assert named["diffugpt-m"] == ["diffusionfamily/diffugpt-m"]
    assert named["bd3lm-owt-block_size16"] == ["kuleshov-group/bd3lm-owt-block_size16", "openai-community/gpt2"]
    assert named["llada-1.5"] == ["GSAI-ML/LLaDA-1.5"]
    assert named["smollm2-135m-instruct"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert named["qwen3-0.6b-base"] == ["Qwen/Qwen3-0.6B-Base"]
    assert all(name == name.lower() for name in named)


# --- byte-pair vocabularies ----------------------------------------------------------------------


def read_vocabulary(folder, size):
    return bpe_tokenizer(folder, *read_bpe(folder), size)


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
    tokenizer = read_vocabulary(folder, size)
    reference = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for line, expected in zip(mixed_lines, reference.encode_batch(mixed_lines)):
        ids = tokenizer.encode(line)
        assert ids == expected.ids, line
        assert tokenizer.decode(ids) == line


def test_writing_a_vocabulary_is_the_inverse_of_reading_it(vocabulary, tmp_path):
    texts = bpe_texts(read_vocabulary(*vocabulary))
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert same_vocabulary(tmp_path, vocabulary[0])


@pytest.mark.slow
def test_every_character_of_unicode_comes_back(vocabulary):
    tokenizer = read_vocabulary(*vocabulary)
    for start in range(0, 0x110000, 0x800):
        if start != 0xD800:  # the surrogates are no characters
            characters = map(chr, range(start, start + 0x800))
            text = "".join(f"a{c}b 1{c}{c} {c}." for c in characters)
            assert tokenizer.decode(tokenizer.encode(text)) == text, hex(start)


def test_special_tokens_written_out_stay_text(vocabulary):
    tokenizer = read_vocabulary(*vocabulary)
    assert set(FIRST) | {"<mask>"} <= set(tokenizer.special)
    for name in tokenizer.special:
        ids = tokenizer.encode(f"{name} and {name}")
        assert not set(ids) & set(tokenizer.special_ids)
        assert tokenizer.decode(ids) == f"{name} and {name}"


def test_special_tokens_have_their_ids_and_are_decoded_as_what_they_mean(vocabulary):
    folder, size = vocabulary
    tokenizer = read_vocabulary(folder, size)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 2, size - 1)
    assert tokenizer.encode_line("one\n") == [0, *tokenizer.encode("one"), 2]
    assert tokenizer.decode([0, *tokenizer.encode("one"), size - 1, 1, 2]) == "one<mask>\n"


def test_a_megabyte_of_text_is_encoded_in_a_second(vocabulary):
    tokenizer = read_vocabulary(*vocabulary)
    text = library_text().encode()[: 2**20].decode(errors="ignore")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        tokenizer.encode(text)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1


# --- checkpoints of every family -----------------------------------------------------------------

SAVED = {  # a family, and what may differ from its smallest model
    "setitem": [{}, {"conv": 0}, {"block": 4}, {"block": 1, "shift_id": 256}],
    "bert": [{}, {"tied": True}, {"first_position": 2, "token_types": 1, "head_activation": "relu"}],
    "gpt2": [{"block": 1, "shift_id": 256}, {"shift_id": 256, "tied": True}, {"mlp_width": 24, "norm_eps": 1e-2}],
    "mdlm": [{}, {"block": 4, "activation": "gelu_tanh"}, {"tied": True}],
    "llama": [{}, {"block": 1, "shift_id": 256, "head_dim": 10, "qk_norm": True}],
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
            for other in SAVED.keys() - {family, *(["llama"] if family == "llada" else [])}:  # these are one network
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
        ("llama", {"head_dim": 9}),
        ("llama", {"head_dim": 6}),
        ("llama", {"qk_norm": True}),
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
