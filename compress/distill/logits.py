"""Distillation on text: at each next token the student learns the teacher's distribution.

The loss is a divergence between the two, with a share of the text's own tokens, and what else
the options weigh. Forward KL is the default: it keeps a student from dropping what the teacher
finds possible, and so from growing too sure.

Papers: arXiv:1503.02531; for pruned language models, Minitron, arXiv:2407.14679, section 4.
"""

from unicomp.compress.distill_method import DistillMethod


class Logits(DistillMethod):
    """Options of distillation on text."""
