"""Scales of a delta, trained on text so that the base with it answers as the fine-tune does.

Signs and factors stay; what is trained is each scale `a`, as `a (1 + t)` with t from 0, to the
least squared difference of the two models' logits. A scale fitted to weights makes the least error
of weights; one fitted to logits also makes up for what the other weights miss.

Paper: BitDelta, arXiv:2402.10193, section 3.1, equation 4.
Differs: t instead of the scale, so that one rate suits scales of any size; scales per row and those
of int8 factors are trained too where a delta has them; where the text shows no gain, the scales
stay as they were.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unicomp.compress.counted import SCALE_BATCH
from unicomp.errors import UnsupportedError
from unicomp.kernels.delta_product import DeltaProduct

RATE = 0.01
HELD = 8  # windows that are not trained on, where there are twice as many: they judge the gain


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it.

    scales         tensor's name -> place in it (`scale0`, `u_scale`, ...) -> values as before
    before, after  mean squared difference of logits on windows that were not trained on
    """

    scales: Mapping[str, Mapping[str, Tensor]]
    before: float
    after: float


def distill(
    student: nn.Module,
    teacher: nn.Module,
    products: Mapping[str, DeltaProduct],
    windows: Tensor,
    *,
    steps: int,
    seed: int,
    progress: Callable[[int, float], None] = lambda _, __: None,
) -> Trained:
    """Train the scales of a loaded delta.

    student   the base with the delta, in torch and float32; its products are left with the result
    products  tensor's name -> its delta in the student
    windows   int64 [windows, tokens]
    progress  is told the step and its loss

    Raises UnsupportedError where the delta has no scales.
    """
    places = [
        (name, place)
        for name, product in products.items()
        for place, _ in product.named_buffers()
        if place.startswith("scale") or place == "u_scale"
    ]
    if not places:
        raise UnsupportedError(
            "this delta has no scales to train: its factors are float16, and it has no planes",
            hint="leave out `--calibration`",
        )
    student.requires_grad_(False)
    first = {key: products[key[0]].get_buffer(key[1]).clone() for key in places}
    shifts = {key: torch.zeros_like(value, requires_grad=True) for key, value in first.items()}

    def put(times: float = 1.0) -> None:
        for (name, place), value in first.items():
            setattr(products[name], place, value * (1 + times * shifts[name, place]))

    held = windows[:HELD] if len(windows) >= 2 * HELD else windows
    trained = windows[HELD:] if len(windows) >= 2 * HELD else windows
    before = _loss(student, teacher, held)
    optimizer = torch.optim.AdamW(shifts.values(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        some = trained[torch.randperm(len(trained), generator=draw)[:SCALE_BATCH]]
        with torch.no_grad():
            wanted = teacher(some).logits.float()
        put()
        loss = (student(some).logits.float() - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, float(loss.detach()))
    with torch.no_grad():
        put()
        after = _loss(student, teacher, held)
        if not after < before:  # NaN too
            put(0.0)
            after = before
    found: dict[str, dict[str, Tensor]] = {}
    for name, place in places:
        found.setdefault(name, {})[place] = products[name].get_buffer(place).detach().clone()
    return Trained(found, before, after)


@torch.no_grad()
def _loss(student: nn.Module, teacher: nn.Module, windows: Tensor) -> float:
    total = 0.0
    for some in windows.split(SCALE_BATCH):
        rest = student(some).logits.double() - teacher(some).logits
        total += float(rest.square().mean(dtype=torch.float64)) * len(some)
    return total / len(windows)
