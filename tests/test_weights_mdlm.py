"""MDLM and BD3-LM: the logits of a plain network written from the papers and the released configuration."""

import math

import pytest
import torch
import torch.nn.functional as F
from model_files import START, converted, edit, mdlm_settings, without, write_mdlm
from safetensors.torch import save_file

import sample
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")


# --- the reference -------------------------------------------------------------------------------


def rotated(x):
    """Rotary positions (2104.09864) of x (B, H, T, D): channels i and i + D/2 are a complex number."""
    T, D = x.shape[-2:]
    angle = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(D // 2) * 2 / D)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def reference(tensors, settings, idx, clean=None):
    """Logits (B, T, V) of the network as it was released (2406.07524, app. C; 2212.09748): told the level 0.
    With clean, BD3-LM's pass over [xt ; x0] and its mask (2503.09573, app. B).
    """
    w = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    (B, T), C, H = idx.shape, settings["hidden_dim"], settings["n_heads"]

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def told(name, n):
        if f"{name}.weight" not in w:
            return torch.zeros(n, C) + (torch.arange(n) % 3 == 2)[:, None]
        embedding = torch.tensor([math.cos(0.0)] * 128 + [math.sin(0.0)] * 128)
        return linear(name, F.silu(linear("sigma_map.mlp.2", F.silu(linear("sigma_map.mlp.0", embedding))))).view(n, C)

    def norm(name, x, shift, scale):
        return F.layer_norm(x, (C,)) * w[f"{name}.weight"] * (1 + scale) + shift

    sees, x = torch.ones(T, T, dtype=torch.bool), w["vocab_embed.embedding"][idx]
    if clean is not None:
        noisy, block = torch.arange(2 * T) < T, torch.arange(2 * T) % T // settings["block_size"]
        own = (block[:, None] == block) & (noisy[:, None] == noisy)
        sees = own | (block[:, None] > block) & ~noisy
        x = torch.cat((x, w["vocab_embed.embedding"][clean]), 1)
    halves = x.shape[1] // T
    for i in range(settings["n_blocks"]):
        vectors, name = told(f"blocks.{i}.adaLN_modulation", 6), f"blocks.{i}."
        y = norm(f"{name}norm1", x, *vectors[:2])
        q, k, v = linear(f"{name}attn_qkv", y).view(B, halves * T, 3, H, -1).permute(2, 0, 3, 1, 4)
        q, k = (torch.cat([rotated(part) for part in z.split(T, 2)], 2) for z in (q, k))
        scores = (q @ k.mT / math.sqrt(C / H)).masked_fill(~sees, -math.inf)
        x = x + vectors[2] * linear(f"{name}attn_out", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = norm(f"{name}norm2", x, *vectors[3:5])
        y = linear(f"{name}mlp.2", F.gelu(linear(f"{name}mlp.0", y), approximate="tanh"))
        x = x + vectors[5] * y
    x = norm("output_layer.norm_final", x, *told("output_layer.adaLN_modulation", 2))
    return linear("output_layer.linear", x)[:, :T]


@torch.no_grad()
def largest_difference(model, tensors, settings, lengths, K=None):
    """The largest between the logits of random canvases, half of them holes, but for that of `<mask>`."""
    torch.manual_seed(0)
    largest, mask_id = 0.0, settings["vocab_size"] - 1
    for T in lengths:
        x0 = torch.randint(mask_id, (3, T))
        xt = x0.masked_fill(torch.rand(3, T) < 0.5, mask_id)
        ours, theirs = model(xt, clean=x0), reference(tensors, settings, xt, x0 if K else None)
        assert ours.dtype == torch.float32
        assert (ours[..., mask_id] == -torch.inf).all()
        largest = max(largest, (ours - theirs)[..., :mask_id].abs().max().item())
    return largest


ODD = {
    "one head, one layer": mdlm_settings(width=20, layers=1, heads=1, length=31),
    "three heads": mdlm_settings(width=42, layers=3, heads=3, length=17, vocab_size=131),
    "blocks of 4": mdlm_settings("bd3lm", length=24, block_size=4, cross_attn=True, adaln=True),
    "blocks of 6, not told the level": mdlm_settings("bd3lm", length=24, block_size=6, adaln=False),
    "one block, as it is pretrained": mdlm_settings("bd3lm", length=24, block_size=24, adaln=False),
    "no blocks at all": mdlm_settings("bd3lm", length=24, block_size=4, cross_attn=False),
}
REAL = {
    "mdlm-owt": mdlm_settings(width=768, layers=12, heads=12, length=1024, vocab_size=50258),
    "bd3lm-owt-block_size16": mdlm_settings(
        "bd3lm", width=768, layers=12, heads=12, length=1024, vocab_size=50258, block_size=16, adaln=True
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_logits_of_odd_shapes_are_those_of_the_reference(name, merges, tmp_path):
    settings = ODD[name]
    K = settings.get("block_size", 24) if settings.get("cross_attn", True) else 24
    settings, tensors = write_mdlm(tmp_path / "model", settings, None, merges[:20])
    model = converted(tmp_path / "model")
    blocks = K < 24
    lengths = range(K, 25, K) if blocks else range(1, settings["model_length"] + 1)
    largest = largest_difference(model, tensors, settings, lengths, blocks)
    print(f"{name}: the largest difference is {largest:.1e}")
    assert model.config.block == (K if blocks else None)
    assert largest < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_logits_of_the_real_shapes_are_those_of_the_reference(name, merges, tmp_path):
    settings, tensors = write_mdlm(tmp_path / "model", REAL[name], None, merges[:200])
    model = converted(tmp_path / "model")
    largest = largest_difference(model, tensors, settings, [256], settings.get("block_size"))
    print(f"{name}: the largest difference is {largest:.1e}")
    assert largest < 1e-4


def test_a_level_that_is_told_changes_the_network(merges, tmp_path):
    """What is folded away is not nothing: without it the logits are others."""
    settings, tensors = write_mdlm(tmp_path / "model", mdlm_settings(), None, merges[:20])
    told = converted(tmp_path / "model")
    untold = {name: t for name, t in tensors.items() if "adaLN" not in name and "sigma_map" not in name}
    write_mdlm(tmp_path / "untold", {**settings, "adaln": False}, untold, merges[:20])
    untold = converted(tmp_path / "untold")
    ids = torch.randint(settings["vocab_size"] - 1, (2, 20))
    assert (told(ids) - untold(ids))[..., :-1].abs().max() > 0.1


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def mdlm(merges, tmp_path):
    """A small MDLM's folder, its settings and tensors."""
    return tmp_path / "model", *write_mdlm(tmp_path / "model", mdlm_settings(), None, merges[:200])


@pytest.mark.parametrize("more", [{}, {"kind": "bd3lm", "block_size": 4}], ids=["mdlm", "bd3lm"])
def test_files_become_a_checkpoint_that_samples_scores_and_shows(more, merges, run, use, tmp_path):
    folder = tmp_path / "model"
    settings, tensors = write_mdlm(folder, mdlm_settings(**more), None, merges[:200])
    run(folder, "--out", tmp_path / "mdlm.pt")
    model, tokenizer, _ = load_checkpoint(tmp_path / "mdlm.pt")
    assert largest_difference(model, tensors, settings, [24], more.get("block_size")) < 1e-4
    mask_id = settings["vocab_size"] - 1
    assert (model.config.mask_id, model.config.special_ids) == (mask_id, (mask_id,))
    assert tokenizer.mask_id == mask_id
    use(tmp_path / "mdlm.pt")


def test_the_end_of_a_text_is_written_and_read_as_a_new_line(mdlm, run, tmp_path):
    """It stood between the texts that MDLM was trained on, so it is one of its tokens."""
    folder, _, tensors = mdlm
    run(folder, "--out", tmp_path / "mdlm.pt")
    model, tokenizer, _ = load_checkpoint(tmp_path / "mdlm.pt")
    end = tokenizer.special[START]
    with torch.no_grad():
        model.head.bias[end] = 100
    *_, canvas = sample.denoise(model, torch.full((2, 20), tokenizer.mask_id), 5)
    assert (canvas == end).all()
    one = tokenizer.encode("one")
    assert tokenizer.decode([*one, end, end, *one, end]) == "one\none\n"


def test_half_precision_files_stay_so(mdlm, run, tmp_path):
    folder, _, tensors = mdlm
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    run(folder, "--out", tmp_path / "mdlm.pt")
    model = load_checkpoint(tmp_path / "mdlm.pt", keep=torch.bfloat16)[0]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


BROKEN = {
    "a level that is told": ({"time_conditioning": True}, lambda t: t, "time_conditioning is True"),
    "a causal one": ({"causal": True}, lambda t: t, "causal is True"),
    "heads of odd width": ({"n_heads": 32}, lambda t: t, "don't make a model"),
    "no layers of it": ({"n_blocks": 10**7}, lambda t: t, "don't make a model"),
    "another kind of model": ({"model_type": "t5"}, lambda t: t, "mdlm, bd3lm"),
    "a missing gate": ({}, lambda t: without(t, "blocks.1.adaLN_modulation.weight"), "blocks.1.adaLN"),
    "a missing bias": ({}, lambda t: without(t, "blocks.1.mlp.0.bias"), "layers.1.mlp.up.bias"),
    "a level of another size": ({}, lambda t: t | {"backbone.sigma_map.mlp.0.bias": torch.ones(5)}, "model"),
    "a tensor too many": ({}, lambda t: t | {"backbone.adapter": torch.ones(2)}, "adapter"),
}


@pytest.mark.parametrize("change", BROKEN)
def test_what_is_no_such_model_is_refused_in_a_sentence(change, mdlm, mistake, tmp_path):
    folder, _, tensors = mdlm
    changes, alter, names = BROKEN[change]
    edit(folder / "config.json", **changes)
    save_file(alter(tensors), folder / "model.safetensors")
    assert names in mistake(folder, "--out", tmp_path / "out.pt")
