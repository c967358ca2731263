"""A delta folder and its base -> the fine-tune again, one tensor at a time."""

import shutil
from pathlib import Path

from unicomp.checkpoint import Checkpoint
from unicomp.hub import resolve
from unicomp.kernels.delta_folder import WEIGHTS, check_base, open_delta
from unicomp.kernels.dense import open_dense
from unicomp.recipes.stage.prepare import working_folder
from unicomp.recipes.stage.progress import Progress, Show
from unicomp.writer import Meta, Writer, check_target, copy_file, publish


def restore(
    delta: Path, base: str, out: Path, *, overwrite: bool = False, progress: Show = lambda _: None
) -> None:
    """Make the fine-tune again, as a plain checkpoint: the base plus the decoded delta.

    Raises CheckpointError, naming the tensor, for another base than the delta's and for a delta
    that is not whole.
    """
    check_target(out, overwrite=overwrite)
    opened = open_delta(delta)
    checkpoint = Checkpoint.open(resolve(base).folder)
    check_base(
        opened, checkpoint, lambda name: progress(Progress("prepare", 0, 0, f"hashing {name}"))
    )
    dense = open_dense(checkpoint)
    layout = [
        Meta(name, own.dtype, tuple(own.shape)) for name, own in opened.manifest.tensors.items()
    ]
    folder = working_folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        writer = Writer(folder, layout)
        for index, (name, own) in enumerate(opened.manifest.tensors.items(), 1):
            progress(Progress("restore", index, len(layout), name))
            known = None if own.kind == "exact" else dense.read(name)
            writer.write(name, opened.restored(name, known))
        writer.finish()
        for name in opened.manifest.files:
            if name not in (WEIGHTS, "recipe.yaml"):
                copy_file(delta / name, folder / name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    publish(folder, out, overwrite=overwrite)
