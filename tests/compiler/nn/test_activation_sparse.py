# SPDX-License-Identifier: Apache-2.0
"""Activation-sparse MLPs: their equations, bounds after a step, the switch of existing transformers, export."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from torch import nn

import compiler
from compiler.nn.activation_sparse import (
    DBMLP,
    FineTuning,
    JSquaredReLU,
    MixedActivation,
    RestrictedLayerNorm,
    SparsityMeter,
    ZerothBiasLinear,
    clip_zeroth_bias,
    find_mlps,
    j_squared_relu,
    make_activation_sparse,
    restrict_layer_norms,
    restrict_scale,
)
from compiler.recipe import Recipe, Rule


def test_j_squared_relu_and_its_gradient():
    x = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 1.0, 3.0, math.inf, math.nan], requires_grad=True)
    y = j_squared_relu(x)
    assert y[:7].tolist() == [0, 0, 0, 0, 1.5, 7.5, math.inf] and y[7].isnan()
    y.sum().backward()
    assert x.grad[:6].tolist() == [0, 0, 1, 1, 2, 4]


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(j_squared_relu, x.requires_grad_())
    mlp = DBMLP(5, 7, 4).double()
    assert torch.autograd.gradcheck(mlp, x)


@pytest.mark.parametrize("placement", ["input", "output"])
def test_db_mlp_is_its_equation(placement):
    torch.manual_seed(0)
    mlp = DBMLP(6, 9, 5, placement=placement)
    layer = mlp.fc1 if placement == "input" else mlp.fc2
    assert not layer.zeroth_bias.any() and layer.zeroth_bias.shape == (5, 6)
    nn.init.normal_(layer.zeroth_bias)
    x, d = torch.randn(2, 4, 6), layer.zeroth_bias[:4]
    before, after = (d, 0) if placement == "input" else (0, d)
    hidden = j_squared_relu((x + before) @ mlp.fc1.weight.T + mlp.fc1.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias + after)


def test_more_tokens_than_rows_are_an_error():
    with pytest.raises(ValueError, match="6 tokens, but the zeroth bias has rows for 5"):
        DBMLP(3, 4, 5)(torch.zeros(1, 6, 3))
    with pytest.raises(ValueError, match="placement is 'middle'"):
        DBMLP(3, 4, 5, placement="middle")


def test_tokens_given_as_rows():
    torch.manual_seed(0)
    plain = ZerothBiasLinear(3, 4, 5)
    nn.init.normal_(plain.zeroth_bias)
    rows = ZerothBiasLinear(3, 4, 5, sequence=5)
    rows.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(rows(x.reshape(10, 3)).reshape(2, 5, 4), plain(x))


def test_bounds_after_a_step():
    layer = ZerothBiasLinear(3, 4, 2)
    with torch.no_grad():
        layer.zeroth_bias.copy_(torch.tensor([[1.0, -1.0, 0.05], [0.3, 0.0, -9.0]]))
    clip_zeroth_bias(layer, torch.tensor([2.0, -4.0, 1.0]))
    torch.testing.assert_close(
        layer.zeroth_bias.detach(), torch.tensor([[0.2, -0.4, 0.05], [0.2, 0.0, -0.1]])
    )
    scale = torch.tensor([0.5, -0.2, 0.0, -3.0, 2.0])
    restrict_scale(scale, 0.4)
    torch.testing.assert_close(scale, torch.tensor([0.5, -0.4, 0.4, -3.0, 2.0]))
    restrict_scale(scale, from_scratch=True)
    assert scale.tolist() == [1, 1, 1, 1, 2]


def test_restricted_layer_norm():
    torch.manual_seed(0)
    norm, x = RestrictedLayerNorm(6), torch.randn(3, 6)
    torch.testing.assert_close(norm(x), nn.LayerNorm(6)(x))
    assert [n for n, _ in norm.named_parameters()] == ["weight"]


def test_mixing_is_exact_at_both_ends_and_saved():
    x, mixed = torch.randn(100), MixedActivation(nn.GELU())
    assert torch.equal(mixed(x), nn.GELU()(x))
    mixed.k = 0.25
    torch.testing.assert_close(mixed(x), 0.75 * nn.GELU()(x) + 0.25 * j_squared_relu(x))
    other = MixedActivation(nn.GELU())
    other.load_state_dict(mixed.state_dict())
    assert other.k == 0.25
    mixed.k = 1.0
    assert torch.equal(mixed(x), j_squared_relu(x))


def test_meter():
    x = torch.tensor([[[1.0, -1.0, 2.0, -3.0], [1.0, -1.0, -2.0, -3.0]]])
    model = nn.Sequential(JSquaredReLU(), nn.Identity())
    with SparsityMeter.of(model) as meter:
        model(x)
        model(x)
    model(torch.ones(1, 4))  # no longer counted
    assert (
        meter.sparsity("0") == 5 / 8 and meter.density("0") == 3 / 8 and meter.union("0") == 1 / 2
    )
    assert list(meter.modules) == ["0"]


def transformer(name: str) -> tuple[nn.Module, dict]:
    """A tiny network of `transformers` and its inputs: 2 sequences of 6 tokens (ViT: 5)."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = {"input_ids": torch.randint(0, 50, (2, 6))}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "bert":
        config = hf.BertConfig(
            vocab_size=50, intermediate_size=24, max_position_embeddings=8, **sizes
        )
        return hf.BertModel(config, add_pooling_layer=False).eval(), tokens
    if name == "vit":
        config = hf.ViTConfig(
            intermediate_size=24, image_size=8, patch_size=4, hidden_act="relu", **sizes
        )
        model = hf.ViTModel(config, add_pooling_layer=False)
        return model.eval(), {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "opt":
        config = hf.OPTConfig(
            vocab_size=50, ffn_dim=24, max_position_embeddings=8, word_embed_proj_dim=16, **sizes
        )
        return hf.OPTModel(config).eval(), tokens
    gated = {"feed_forward_proj": "gated-relu"} if name == "t5_gated" else {}
    config = hf.T5Config(
        vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, **gated
    )
    return hf.T5EncoderModel(config).eval(), tokens


TRANSFORMERS = ("bert", "vit", "t5", "t5_gated", "opt")


def randomise_norms(model: nn.Module) -> None:
    """Norms as training leaves them: scales not 1, biases not 0."""
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, 0.6, 0.3)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("placement", ["input", "output", None])
def test_switching_changes_nothing_until_mixing_begins(name, placement):
    model, inputs = transformer(name)
    randomise_norms(model)
    names = dict(model.named_parameters())
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state
        mlps = make_activation_sparse(model, tokens=8, placement=placement, sequence=6)
        assert len(mlps) == 2
        assert torch.equal(model(**inputs).last_hidden_state, wanted)
    now = dict(model.named_parameters())
    assert all(now[n] is p for n, p in names.items())
    assert len(now) == len(names) + (2 if placement else 0)
    tuning = FineTuning(model, mlps, mixing_steps=4, uplift_steps=4)
    tuning.step()
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).last_hidden_state, wanted)


@pytest.mark.parametrize(
    ("name", "restricted"), [("bert", 0), ("vit", 2), ("t5", 2), ("t5_gated", 2), ("opt", 2)]
)
def test_fine_tuning_ends_restricted_and_sparse_capable(name, restricted):
    model, inputs = transformer(name)
    randomise_norms(model)
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state
        mlps = make_activation_sparse(model, tokens=8, sequence=6)
        norms = restrict_layer_norms(model, mlps)
        assert len(norms) == restricted
        torch.testing.assert_close(model(**inputs).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tuning = FineTuning(model, mlps, mixing_steps=2, uplift_steps=4, restricted=norms)
    for step in range(1, 5):
        optimizer.zero_grad()
        model(**inputs).last_hidden_state.square().mean().backward()
        optimizer.step()
        tuning.step()
        for mlp in mlps:
            scale = model.get_submodule(mlp.norm).weight.abs()
            assert model.get_submodule(mlp.activation).k == min(1, step / 2)
            if mlp.norm in norms:
                assert scale.min() >= step / 4
            d = model.get_submodule(mlp.up).zeroth_bias
            assert d.any() and (d.abs() <= 0.1 * scale + 1e-7).all()
    with SparsityMeter.of(model.eval()) as meter, torch.no_grad():
        model(**inputs)
    assert sorted(meter.modules) == sorted(m.activation for m in mlps)
    assert all(0.1 < meter.sparsity(n) < 1 for n in meter.modules)


def test_the_switch_says_what_it_lacks():
    with pytest.raises(ValueError, match="no known MLP in Linear"):
        make_activation_sparse(nn.Linear(2, 2))
    model, _ = transformer("opt")
    with pytest.raises(ValueError, match="needs tokens="):
        make_activation_sparse(model)
    with pytest.raises(ValueError, match="say sequence="):
        make_activation_sparse(model, tokens=8)
    assert len(list(find_mlps(model))) == 2


@pytest.mark.parametrize("placement", ["input", "output"])
def test_db_mlp_exports(placement, agrees_when_exported):
    torch.manual_seed(0)
    model = nn.Sequential(RestrictedLayerNorm(6), DBMLP(6, 9, 5, placement=placement))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    agrees_when_exported(model, torch.randn(2, 5, 6))


class Hidden(nn.Module):
    """The last hidden state of a network, and nothing else."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_switched_transformers_are_exported_and_compiled(name, kind, tmp_path, monkeypatch):
    """At the end of the mixing, with zeroth biases that are not zero: every MLP's second layer skips zeros."""
    # Whether that pays on layers so small is not the question here.
    family = importlib.import_module("passes.activation_sparse.rewrite")
    monkeypatch.setattr(family, "crossover", lambda *_args: 0.6)
    model, inputs = transformer(name)
    mlps = make_activation_sparse(model, tokens=8, sequence=6)
    for mlp in mlps:
        nn.init.normal_(model.get_submodule(mlp.up).zeroth_bias, std=0.1)
    FineTuning(model, mlps, mixing_steps=1).step()
    if kind == "onnx" and name.startswith("t5"):
        model.set_attn_implementation("eager")  # with sdpa torch's exporter fails, switched or not
    network, x = Hidden(model).eval(), next(iter(inputs.values()))
    file = tmp_path / f"model.{kind}"
    if kind == "pt2":
        torch.export.save(torch.export.export(network, (x,)), file)
    else:
        torch.onnx.export(network, (x,), file, dynamo=True, verbose=False)
    recipe = Recipe("all", (Rule("*", "activation_sparse", {"density": 0.05}),))
    artifact = compiler.compile_model(file, recipe=recipe, choose="asked")
    taken = [row for row in artifact.layers if row["treatment"] == "activation_sparse"]
    wanted = "gated relu" if name == "t5_gated" else "j-squared-relu"
    kinds = [row["found"]["input_zeros"] for row in taken if "input_zeros" in row["found"]]
    assert kinds == [wanted] * len(mlps)
    with torch.no_grad():
        expected = network(x).numpy()
    got = compiler.load(artifact.path)(x.numpy())
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
