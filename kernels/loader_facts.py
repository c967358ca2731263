"""What vLLM does not take of codes where formats ask too: every fact once, condition and words.

A format asks before it chooses how a model is written (`settle`), and the lint asks of what a plan
or a folder holds; both must mean and say the same. Whatever only the lint asks is a rule of its
own. vLLM was read (0.33), not run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from unicomp.kernels.packed import Scheme

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""What vLLM holds as one module, so that the parts must share a scheme."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What a loader does not take.

    why    what is the matter, in words that follow the loader's name
    wrong  tells whether codes of a weight [out, in] are such
    """

    why: str
    wrong: Callable[[tuple[int, int], Scheme], bool]


VLLM_HALF_WORDS = Fact(
    "it wants rows of codes to fill whole 32-bit words",
    lambda shape, scheme: shape[1] * scheme.bits % 32 != 0,
)
VLLM_ZERO_POINTS = Fact(
    "it takes zero points with 4 bits only",
    lambda shape, scheme: not scheme.symmetric and scheme.bits != 4,
)
VLLM_GPTQ_WIDTH = Fact(
    "it runs gptq with 4 and 8 bits only", lambda shape, scheme: scheme.bits not in (4, 8)
)
VLLM_GPTQ_ZERO_POINTS = Fact(
    "it runs symmetric gptq only", lambda shape, scheme: not scheme.symmetric
)
