"""What llama.cpp does not take: no folder, only a GGUF; and what one loses on the way there.

`unicomp export --format gguf` turns a folder into a GGUF that llama.cpp was seen to run; what its
types cannot hold becomes F16, of the right value and four times the size.
"""

from unicomp.recipes.lint import conditions as when
from unicomp.recipes.lint.rules import Loader, Rule

BLOCK = 32  # columns that share a scale in Q4_0 and Q8_0
METHODS = ("compressed-tensors", "gptq", "bitnet")

LLAMA_CPP = Loader(
    "llama.cpp",
    None,
    "run with the output of `unicomp export --format gguf`",
    (
        Rule(
            "folder",
            when.said(lambda o: not o.gguf, "model.safetensors"),
            "it reads GGUF only",
            "`unicomp export OUT --format gguf --out OUT.gguf`",
        ),
        Rule(
            "zero-points",
            when.each(when.shifted),
            "no GGUF type that is written here has zero points: it becomes F16",
            "quantize symmetrically",
            METHODS,
        ),
        Rule(
            "block",
            when.each(lambda one: one.shape[1] % BLOCK != 0),
            "its columns are no whole blocks of 32: it becomes F16",
            "keep it plain, or choose another width of the model",
            METHODS,
        ),
        Rule(
            "group",
            when.each(lambda one: when.grouped(one) % BLOCK != 0),
            "its groups are no whole blocks of 32: it becomes F16",
            "use groups of 32, 64 or 128",
            METHODS,
        ),
    ),
)
