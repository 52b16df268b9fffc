# SPDX-License-Identifier: Apache-2.0
"""Pruning in torch: masks hold against every optimizer, budgets are met, and the compiler finds the grain."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from compiler.nn.pruning import (
    Pruner,
    gradual,
    prunable,
    prune_and_fine_tune,
    sensitivity,
    squared,
    taylor,
)
from passes.sparse.detect import found
from passes.sparse.grains import Grain
from schedules.errors import UserError


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.b(torch.relu(self.norm(self.a(x)))))


class Net(nn.Module):
    """x [N, 3, 8, 8] -> [N, 5]"""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = Block(16)
        self.up = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.up(self.block(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 3, 8, 8, generator=generator), torch.randint(
        5, (32,), generator=generator
    )


def step(model, data, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()


GRAINS = ("element", "row", "kernel", "filter", "out:4", "in:4", "block:4x4", "2:4")


@pytest.mark.parametrize("grain", GRAINS)
def test_the_grain_asked_for_is_the_one_found(net, grain):
    pruner = Pruner(net, grain, skip=("stem",))
    density = Grain.parse(grain).density or 0.25
    pruner.prune(density)
    assert np.count_nonzero(net.stem.weight.detach().numpy()) == net.stem.weight.numel()
    facts = found(net.block.a.weight.detach().numpy())
    assert facts["grain"] == grain and facts["density"] == pytest.approx(density, abs=0.01)
    assert pruner.densities["block.a"] == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
def test_masks_survive_the_optimizer_even_with_momentum_from_before(net, data, make):
    optimizer = make(net.parameters())
    step(net, data, optimizer)  # momentum of weights that are pruned next
    pruner = Pruner(net, "out:4")
    pruner.prune(0.3)
    before = net.block.a.weight.detach().clone()
    with pruner.attached(optimizer):
        step(net, data, optimizer)
    mask = pruner.masks["block.a"]
    after = net.block.a.weight.detach()
    assert not after[~mask].any() and (after[mask] != before[mask]).any()
    assert not pruner.revived()
    step(net, data, optimizer)  # without the pruner
    assert pruner.revived()


def test_training_that_revives_weights_is_an_error(net, data):
    def train(pruner):
        step(pruner.model, data, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), 2)

    with pytest.raises(UserError, match=r"revived pruned weights.*attached"):
        prune_and_fine_tune(Pruner(net), 0.2, train)


def test_gradual_pruning_ends_at_the_density_and_leaves_no_trace(net, data):
    seen = []

    def train(pruner):
        seen.append(pruner.densities["block.a"])
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        with pruner.attached(optimizer):
            step(net, data, optimizer, 2)

    model = prune_and_fine_tune(
        Pruner(net, "row"), {"block.a": 0.1, "block.b": 0.5}, train, rounds=4
    )
    assert model is net and seen == sorted(seen, reverse=True) and len(seen) == 4
    assert seen == pytest.approx(gradual(0.1, 4), abs=0.01)
    assert float((net.block.b.weight != 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert (net.up.weight != 0).all()
    assert list(net.state_dict()) == list(Net().state_dict())


def test_the_last_density_is_met_exactly_and_the_first_step_is_the_largest():
    densities = gradual(0.05, 6)
    assert densities[-1] == 0.05 and gradual(0.3, 1) == [0.3]
    steps = -np.diff([1, *densities])
    assert (steps > 0).all() and (np.diff(steps) < 0).all()


def test_a_global_budget_takes_from_the_layers_with_the_smallest_weights(net):
    with torch.no_grad():
        net.block.a.weight.mul_(10)
        net.block.b.weight.mul_(0.001)
    pruner = Pruner(net, "row")
    pruner.prune(0.5, scope="global")
    total = sum(m.numel() for m in pruner.masks.values())
    assert sum(float(m.sum()) for m in pruner.masks.values()) / total == pytest.approx(
        0.5, abs=0.01
    )
    assert pruner.densities["block.a"] > 0.99 and pruner.densities["block.b"] < 0.01
    assert pruner.notes == [
        "layer block.b: density 0.5 would leave none of its 768 grains (row); one is kept"
    ]


def test_a_density_that_leaves_nothing_keeps_one_grain_and_says_so(net):
    pruner = Pruner(net, "filter")
    pruner.prune({"stem": 0.01})
    assert int(pruner.masks["stem"].flatten(1).any(1).sum()) == 1
    assert "would leave none of its 16 grains" in pruner.notes[0]


def test_scores_are_pluggable(net, data):
    pruner = Pruner(net, "kernel", score=squared)
    pruner.prune(0.5)
    energy = net.block.a.weight.detach().square()
    assert pruner.masks["block.a"].any()
    with pytest.raises(UserError, match=r"no gradient.*backward"):
        Pruner(Net(), score=taylor).prune(0.5)
    model = Net()
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    wanted = (model.up.weight * model.up.weight.grad).detach().abs().flatten()
    Pruner(model, score=taylor).prune(0.25)
    kept = (model.up.weight != 0).flatten()
    assert wanted[kept].min() >= wanted[~kept].max() and energy.shape == net.block.a.weight.shape


def test_sensitivity_restores_the_model_and_finds_what_matters(net, data):
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        wanted = net.eval()(data[0])

    def closeness(model):
        with torch.no_grad():
            return -float((model(data[0]) - wanted).abs().mean())

    scan = sensitivity(net, closeness, "out:4", (0.1, 0.5), skip=("head",))
    assert scan.baseline == 0 and set(scan.metric) == {"stem", "block.a", "block.b", "up"}
    assert all(by[0.1] <= by[0.5] < 0 for by in scan.metric.values())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    limit = sorted(by[0.5] for by in scan.metric.values())[1]
    budgets = scan.budgets(-limit)
    assert sorted(budgets.values())[-1] == 1.0 and set(budgets.values()) <= {0.1, 0.5, 1.0}


def test_coupled_filters_go_together_and_take_norm_and_bias_along(net, data):
    pruner = Pruner(net, "filter", example=(torch.zeros(1, 3, 8, 8),))
    net.train()
    step(net, data, torch.optim.SGD(net.parameters(), 0.1))
    pruner.prune(0.5)
    dead = {n: ~m.flatten(1).any(1) for n, m in pruner.masks.items()}
    assert dead["stem"].equal(dead["block.b"]) and int(dead["stem"].sum()) == 8
    assert int(dead["block.a"].sum()) == 8 and not dead["block.a"].equal(dead["stem"])
    assert not dead["head"].any()
    assert not net.block.norm.bias[dead["block.a"]].any() and not net.stem.bias[dead["stem"]].any()
    assert net.block.norm.weight[~dead["block.a"]].all()

    from compiler.frontend import import_model
    from compiler.pipeline import canonicalize
    from passes.remove_dead_filters import compact

    mod = canonicalize(import_model(pruner.finish().eval(), example=(torch.zeros(1, 3, 8, 8),)).mod)
    layers = compact(mod)[1]
    assert {n: c.outputs[1] for n, c in layers.items()} == {"stem": 8, "block.a": 8, "block.b": 8, "up": 16, "head": 5}  # fmt: skip


def test_conv1d_linear_and_shared_weights():
    model = nn.ModuleDict({"c": nn.Conv1d(8, 8, 5), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    assert list(prunable(model)) == ["c", "a"]
    Pruner(model, "row").prune(0.25)
    rows = (model["c"].weight != 0).flatten(0, 1)
    assert (rows.all(1) | ~rows.any(1)).all() and int(rows.any(1).sum()) == 16


def test_bad_input(net):
    with pytest.raises(UserError, match="unknown grain 'out:3'"):
        Pruner(net, "out:3")
    with pytest.raises(UserError, match="no such layer to skip; found x"):
        Pruner(net, skip=("x",))
    pruner = Pruner(net, "row")
    with pytest.raises(
        UserError, match=r"layer stem: mask and weight differ in shape; found \(16, 3, 3\)"
    ):
        pruner.set_mask("stem", torch.ones(16, 3, 3))
    with pytest.raises(UserError, match="density must be in"):
        pruner.prune(0)
    with pytest.raises(UserError, match="no such layer; found x"):
        pruner.prune({"x": 0.5})
    with pytest.raises(UserError, match="scope"):
        pruner.prune(0.5, scope="model")
    with torch.no_grad():
        net.up.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer up: NaN scores"):
        pruner.prune(0.5)
    with pytest.raises(UserError, match="2:4 keeps 50%"):
        Pruner(Net(), "2:4").prune(0.1)
    with pytest.raises(UserError, match="nothing to prune"):
        Pruner(nn.ReLU())
    from torch.nn.utils import prune as tp

    tp.l1_unstructured(net.up, "weight", 0.5)
    with pytest.raises(UserError, match="layer up: its weight is computed by another"):
        Pruner(net)


def test_a_mask_of_ones_own_and_nan_weights_behind_it():
    layer = nn.Linear(4, 4)
    mask = torch.eye(4)
    with torch.no_grad():
        layer.weight[0, 1] = float("nan")
    pruner = Pruner(layer)
    pruner.set_mask("", mask)
    assert torch.equal(layer.weight != 0, mask.bool()) and pruner.finish() is layer


def test_the_examples_of_the_documentation_run(net, data, tmp_path, monkeypatch):
    from compiler.inspect import inspect_model

    page = Path(__file__).parents[3] / "docs" / "sparsity.md"
    first, *others = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)

    def evaluate(model):
        with torch.no_grad():
            return -float(nn.functional.cross_entropy(model(data[0]), data[1]))

    monkeypatch.chdir(tmp_path)
    names = {"model": net, "evaluate": evaluate, "batches": [data]}
    exec(compile(first, str(page), "exec"), names)
    layers = {layer.name: layer.found for layer in inspect_model("pruned.pt2").layers}
    pruned = [n for n, d in names["budgets"].items() if d < 1 and n != "stem"]
    assert pruned and all(layers[n]["grain"] == "out:4" for n in pruned)
    assert layers["stem"]["grain"] is None
    for block in others:
        exec(compile(block, str(page), "exec"), names)
    assert names["pruner"].grain.name == "filter" and not names["pruner"].revived()
    assert int((net.block.a.weight != 0).flatten(1).any(1).sum()) == 11  # of 16


def test_importing_loads_neither_tvm_nor_more_than_torch():
    code = "import sys, compiler, compiler.nn; assert 'torch' not in sys.modules; import compiler.nn.pruning; assert 'tvm' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
