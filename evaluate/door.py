"""How lm-eval's own command finds `--model unicomp`.

lm-eval knows the models in its own table, and none that other packages bring. torch, which it
imports, calls the entry points `torch.backends` of installed packages, so that devices from outside
can announce themselves; ours announces a model to lm-eval, where that is what is running, and does
nothing anywhere else. Only a name is put into the table: `tasks/model.py` is imported when it is
asked for. In Python, importing `unicomp.evaluate.tasks.model` does the same.

The metadata of every installation name this file. torch's import fails if an entry point does, so
it stays where it is, and nothing here may raise.
"""

import sys
from importlib import import_module


def announce() -> None:
    """Put `unicomp` into lm-eval's table of models, if lm-eval was imported."""
    if "lm_eval" not in sys.modules:
        return
    try:
        import_module("lm_eval.models")  # fills the table, which counts as full with one entry
        from lm_eval.api.registry import model_registry
    except ImportError:  # another lm-eval than the one we know
        return
    if "unicomp" not in model_registry:
        model_registry.register("unicomp", target="unicomp.evaluate.tasks.model:Unicomp")
