"""Second moments are the means they claim to be, in both dtypes, with the kernel or without."""

import pytest
import torch

from unicomp.compress.moments import Moments, Norms
from unicomp.kernels import gram

CLOSE = 2e-5  # of the largest entry


def batches(dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 1, 300)  # columns of unequal size, as activations have
    return [
        (torch.randn(tokens, 300, generator=random) * scale + 0.1).to(dtype)
        for tokens in (700, 1500, 3)
    ]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_float64s(
    dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(gram, "usable", lambda like: False)
    seen = batches(dtype)
    original = [some.float() + 0.25 * torch.sign(some.float()) for some in seen]
    moments = Moments(300, True)
    for some, other in zip(seen, original, strict=True):
        moments.add(some, other.view(1, *other.shape))
    stats = moments.stats()
    assert stats.tokens == 2203
    x = torch.cat(seen).double()
    drift = torch.cat([(o - s).to(dtype) for o, s in zip(original, seen, strict=True)]).double()
    root = x.square().mean(0).sqrt()
    unit = stats.hessian.double() / root[:, None] / root  # type: ignore[union-attr]
    wanted = x.T @ x / 2203 / root[:, None] / root
    assert float((unit - wanted).abs().max()) < CLOSE
    assert float((unit - wanted.roll(1, 0)).abs().max()) > 100 * CLOSE
    assert torch.equal(stats.hessian, stats.hessian.T)  # type: ignore[arg-type, union-attr]
    cross = drift.T @ x / 2203 / root
    found = stats.cross.double() / root  # type: ignore[union-attr]
    assert float((found - cross).abs().max()) < CLOSE
    assert float((found - cross.T).abs().max()) > 100 * CLOSE


def test_norms_are_roots_of_means() -> None:
    norms = Norms(300)
    for some in batches(torch.float32):
        norms.add(some, None)
    x = torch.cat(batches(torch.float32)).double()
    wanted = x.square().mean(0).sqrt()
    assert torch.allclose(norms.stats().norm.double(), wanted, rtol=1e-6)  # type: ignore[union-attr]
