"""The metrics that task files bring, against numpy."""

import numpy as np
import pytest

from unicomp.evaluate.tasks import worth

VALUES = [(-3.0, False), (-700.0, False), (-1.5, True)]


def test_share_of_the_true_choices() -> None:
    document = {"mc2_targets": {"labels": [1, 1, 0]}}
    p = np.exp([value for value, _ in VALUES])
    expected = (p[0] + p[1]) / p.sum()
    assert worth.true_share(document, VALUES)["acc"] == pytest.approx(expected)
    # Where every likelihood is below what a float holds, their ratios are not.
    low = [(value - 5000, greedy) for value, greedy in VALUES]
    assert worth.true_share(document, low)["acc"] == pytest.approx(expected)
    other = {"mc2_targets": {"labels": [0, 0, 1]}}
    assert worth.true_share(other, VALUES)["acc"] == pytest.approx(1 - expected)


def test_the_likelier_sentence() -> None:
    assert worth.stereotyped({}, [(-3.0, False), (-5.5, False)]) == {
        "pct_stereotype": 1.0,
        "likelihood_diff": 2.5,
    }
    assert worth.stereotyped({}, [(-5.0, False), (-5.0, False)])["pct_stereotype"] == 0


def test_distance_from_known_chances() -> None:
    p, q = np.array([0.2, 0.8, 0.0]), np.exp([value for value, _ in VALUES])
    q = q / q.sum()
    expected = (p[:2] * np.log(p[:2] / q[:2])).sum()
    document = {"probabilities": p.tolist()}
    assert worth.from_truth(document, VALUES)["kl_from_truth"] == pytest.approx(expected)
    exact = [(float(value), False) for value in np.log([0.2, 0.8, 1e-30])]
    assert worth.from_truth(document, exact)["kl_from_truth"] == pytest.approx(0, abs=1e-12)
