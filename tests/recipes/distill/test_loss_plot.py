import re
import xml.etree.ElementTree as Tree

from unicomp.compress.distill.training.figures import Figures
from unicomp.recipes.distill.loss_plot import MOST, loss_plot


def figures(kl: float) -> Figures:
    return Figures(10, *(0.5 for _ in range(8)), kl)


def points(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in found.split()]
        for found in re.findall(r'points="([^"]*)"', svg)
    ]


def test_curves_fall_where_the_figures_do() -> None:
    svg = loss_plot([(1, 2.0), (2, 1.0), (4, 0.5)], [(2, figures(1.5)), (4, figures(0.25))])
    Tree.fromstring(svg)
    loss, apart = points(svg)
    assert len(loss) == 3
    assert len(apart) == 2
    assert [y for _, y in loss] == sorted(y for _, y in loss)  # down the page
    assert [x for x, _ in loss] == sorted(x for x, _ in loss)
    assert apart[1][1] > loss[2][1]  # 0.25 lies below 0.5


def test_a_long_training_is_thinned_and_an_empty_one_is_no_error() -> None:
    [curve] = points(loss_plot([(step, 1.0) for step in range(1, 10_001)], []))
    assert len(curve) <= MOST
    Tree.fromstring(loss_plot([], []))
