"""What is the matter with a file whoever reads it: rules that several loaders have."""

from unicomp.recipes.lint import conditions as when
from unicomp.recipes.lint.rules import Rule

CT, GPTQ = ("compressed-tensors",), ("gptq",)

CONFIG_DISAGREES = Rule(
    "config-disagrees",
    when.disagreeing,
    "the tensors are not what `targets` and `ignore` say",
    "anchor the patterns: they match from the start of a name, and not to its end",
    CT,
)
GPTQ_UNDIVIDED = Rule(
    "gptq-undivided",
    when.each(lambda one: when.undivided(one) or when.half_words(one)),
    "its group, or its words of codes, do not divide the columns",
    "use a group size that divides, or one scale a row",
    GPTQ,
)
GPTQ_PLANAR = Rule(
    "gptq-planar",
    when.said(lambda o: o.quantization.get("checkpoint_format") == "gptq_p", "gptq_p"),
    "the planar layout is GPTQModel's own",
    "export to gptq",
    GPTQ,
)
