"""Two models measured in turn: rates of both, and the ratio of each round."""

from collections.abc import Callable
from pathlib import Path

from unicomp.evaluate.cost.gain import Rates, beside


def test_a_gain_is_the_median_of_the_rounds_ratios() -> None:
    rates = Rates(baseline=(1.0, 2.0, 10.0), model=(2.0, 6.0, 5.0))
    assert rates.gain == (2.0, 0.5, 3.0)
    assert rates.to_json()["model"] == 5.0


def test_a_model_with_few_layers_is_faster(tiny_model: Callable[..., Path]) -> None:
    """Three layers beside twelve of the same size."""
    few, many = tiny_model("llama"), tiny_model("llama", num_hidden_layers=12)
    told: list[tuple[int, int]] = []
    found = beside(
        few, many, prompt_tokens=16, new_tokens=8, rounds=5, progress=lambda *at: told.append(at)
    )
    assert found.decode.gain[0] > 1.3
    assert found.prefill.gain[0] > 1.0
    assert beside(many, few, prompt_tokens=16, new_tokens=8, rounds=3).decode.gain[0] < 1 / 1.3
    assert told[-1] == (5, 5)
