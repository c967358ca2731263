"""Shares of zeros by measured divergence: the divergence, the sharing out, and the whole."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from unicomp.checkpoint import Checkpoint
from unicomp.compress import sensitivity
from unicomp.compress.calibrate import Decoder
from unicomp.compress.prune.sparsegpt import Sparsegpt
from unicomp.compress.prune.wanda import Wanda
from unicomp.compress.readout import Readout
from unicomp.compress.sensitivity import CHANGE, Unit, divergence, share_out
from unicomp.compress.sparsity import Sparsity
from unicomp.compress.states import HiddenStates
from unicomp.kernels.dense import open_dense
from unicomp.models import Linear, Part, describe


def held(value: Tensor) -> HiddenStates:
    """Return states that stand in memory."""
    states = HiddenStates(None, (value.shape[0], value.shape[1], value.shape[2]))
    with states.filling() as put:
        put(value)
    return states


def unit(energies: Tensor, size: int) -> Unit:
    """Return a unit whose columns' energies are these, ascending."""
    linear = Linear("m", "m", (size, len(energies)), Part("m.weight"))
    energies = energies.double().sort().values
    return Unit((linear,), size, torch.cat([energies.new_zeros(1), energies.cumsum(0)]))


@pytest.mark.parametrize("piece", [1 << 24, 500])
def test_divergence_is_that_of_the_whole_vocabulary(
    piece: int, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the head is read, as float64 says it of all logits at once."""
    folder = tiny_model("llama")
    dense = open_dense(Checkpoint.open(folder))
    monkeypatch.setattr("unicomp.compress.readout.PIECE", piece)
    readout = Readout(describe(dense.config, dense.tensors), dense.config, dense)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(2, 5, 64, generator=generator) for _ in range(2))

    def words(states: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.lm_head(model.model.norm(states.double())).log_softmax(-1)
        return found

    wanted = (words(ours).exp() * (words(ours) - words(theirs))).sum(-1).mean()
    assert divergence(readout, held(ours), held(theirs)) == pytest.approx(float(wanted), rel=1e-4)
    assert divergence(readout, held(theirs), held(ours)) != pytest.approx(float(wanted), rel=1e-3)
    assert divergence(readout, held(ours), held(ours)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_shares_are_the_cheapest_that_fit(seed: int) -> None:
    """As a search of every count says, where the curves are those that are scaled."""
    generator = torch.Generator().manual_seed(seed)
    units = [unit(torch.rand(10, generator=generator), 4) for _ in range(4)]
    costs = (3 * torch.rand(4, generator=generator) + 0.1).tolist()
    common = Sparsity(0.5, within=0.3)
    found = share_out(units, costs, common)
    assert sum(found) == 20
    scaled = [
        one.curve * cost / (one.curve[6] - one.curve[4])
        for one, cost in zip(units, costs, strict=True)
    ]

    def lost(counts: tuple[int, ...]) -> float:
        return sum(float(curve[count]) for curve, count in zip(scaled, counts, strict=True))

    every = [counts for counts in itertools.product(range(2, 9), repeat=4) if sum(counts) == 20]
    assert lost(tuple(found)) == pytest.approx(min(map(lost, every)))
    assert lost((5, 5, 5, 5)) >= lost(tuple(found))
    assert CHANGE == 0.1


def test_shares_stay_within_bound_and_budget() -> None:
    energies = torch.linspace(0.1, 1, 40)
    units = [unit(energies, 8), unit(energies, 7), unit(energies[:20], 5)]
    common = Sparsity(0.4, within=0.05)
    found = share_out(units, [1.0, 50.0, 1.0], common)
    columns = [one.columns for one in units]
    assert all(0.35 <= n / c <= 0.45 for n, c in zip(found, columns, strict=True))
    zeros = sum(n * one.size for n, one in zip(found, units, strict=True))
    budget = int(0.4 * sum(one.size * one.columns for one in units))
    assert budget - 5 < zeros <= budget
    assert found[1] / 40 < 0.4 < found[0] / 40
    none = share_out(units, [0.0, 0.0, 0.0], common)  # nothing was measured: whatever fits
    assert sum(n * one.size for n, one in zip(none, units, strict=True)) <= budget


@pytest.mark.parametrize("arch", ["llama", "mixtral", "gpt2"])
def test_every_linear_has_a_share(
    arch: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts that are alike have one; nothing is left on disk; the same twice."""
    dense = open_dense(Checkpoint.open(tiny_model(arch)))
    model = describe(dense.config, dense.tensors)
    ids = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(0))
    targets = [linear.module for linear in model.linears()]
    made = []
    for batch in (4, 4):
        decoder = Decoder(model, dense.config, dense, batch=batch, scratch=None)
        readout = Readout(model, dense.config, dense)
        common = Sparsity(0.5, within=0.1)
        made.append(sensitivity.shares(decoder, readout, ids, targets, common, tmp_path))
    assert made[0] == made[1]
    assert made[0].keys() == set(targets)
    assert not list(tmp_path.iterdir())
    sizes = {linear.module: linear.shape[0] * linear.shape[1] for linear in model.linears()}
    zeros = sum(made[0][name] * size for name, size in sizes.items())
    assert 0.49 < zeros / sum(sizes.values()) < 0.5 + 1e-6
    assert len({round(share, 4) for share in made[0].values()}) > 3
    assert all(0.4 - 1e-6 <= share <= 0.6 + 1e-6 for share in made[0].values())
    if arch == "mixtral":
        for layer in model.layers:
            alike = {made[0][one.module] for one in layer.steps[-1][0] + layer.steps[-1][1]}
            assert len(alike) == 1


@pytest.mark.parametrize("method", [Wanda, Sparsegpt])
def test_patterns_are_the_same_everywhere(method: type[Wanda | Sparsegpt]) -> None:
    with pytest.raises(ValueError, match="`2:4` is the same everywhere"):
        method(sparsity="2:4", allocation="sensitivity")
    target = method(sparsity=0.3, allocation="sensitivity").target("m", 8)
    assert str(target) == "0.3 ± 0.05"
    assert str(method(sparsity=0.3).target("m", 8)) == "0.3"
