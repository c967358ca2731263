"""What stock loaders do not take of codes: every fact once, its condition and its words.

A format asks before it chooses how a model is written (`settle`), and the lint asks of what a plan
or a folder holds; both must mean and say the same. vLLM was read (0.33), transformers tried (5.23).
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
    wrong  tells whether codes of a weight [out, in] are such; of more than one linear, the asker's
           business
    """

    why: str
    wrong: Callable[[tuple[int, int], Scheme], bool] = lambda shape, scheme: True


VLLM_HALF_WORDS = Fact(
    "it wants rows of codes to fill whole 32-bit words",
    lambda shape, scheme: shape[1] * scheme.bits % 32 != 0,
)
VLLM_BLOCKS = Fact("it takes no integer weights in blocks")
VLLM_ZERO_POINTS = Fact(
    "it takes zero points with 4 bits only",
    lambda shape, scheme: not scheme.symmetric and scheme.bits != 4,
)
VLLM_CONV1D = Fact("it takes no packed Conv1D from compressed-tensors")
VLLM_NEIGHBOURS = Fact(
    "it holds q, k and v as one, gate and up, and all experts of a layer: this differs from its "
    "neighbours"
)
VLLM_STACKED = Fact("it reads plain experts one by one, not stacked")
VLLM_GPTQ_WIDTH = Fact(
    "it runs gptq with 4 and 8 bits only", lambda shape, scheme: scheme.bits not in (4, 8)
)
VLLM_GPTQ_ZERO_POINTS = Fact(
    "it runs symmetric gptq only", lambda shape, scheme: not scheme.symmetric
)
TRANSFORMERS_ONE_SCHEME = Fact(
    "it makes packed zero points and Conv1D dense at load, and wants one scheme for all then: this "
    "has another"
)
TRANSFORMERS_PLAIN_EXPERTS = Fact(
    "plain experts beside packed linears are thrown away unless they are stacked"
)
