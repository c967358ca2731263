"""A checkpoint of ours as an lm-eval model: packed where it can be, else as it is.

    lm_eval --model unicomp --model_args pretrained=DIR[,compute=int8] --tasks ...

Everything that turns logits into results is lm-eval's own `HFLM`; only the loading is ours, so
that the same weights give the same digits as `--model hf`. `door.py` says how lm-eval finds it.

Differs: what lm-eval's `hf` takes for loading (`parallelize`, `peft`, quantization options) is not
taken here; a checkpoint says itself what it is.
"""

from typing import Any

import torch
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from unicomp import hub, text
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate.models import Watch, refuse_nan
from unicomp.kernels import packed_model
from unicomp.kernels.load import load

NAME = "unicomp"
DEQUANTIZED = "dequantized"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of HFLM's own arguments, those that have a meaning for a model that is loaded already.
KNOWN = frozenset(
    "max_length add_bos_token prefix_token_id logits_cache softmax_dtype truncation "
    "max_batch_size think_end_token enable_thinking chat_template_args".split()
)


class Unicomp(HFLM):  # type: ignore[misc]
    """An lm-eval model over a checkpoint, or over a model that is in memory."""

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: Any = None,
        compute: str = "int8",
        dtype: str | None = None,
        backend: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        """Load a checkpoint, or take a model as it is.

        pretrained  a folder, a Hub id or `builtin:NAME`; or a model, which needs a tokenizer
        compute     `int8` or `exact`: packed weights stay packed; `dequantized`: they do not
        device      where to compute; without a GPU, `cuda` means the CPU, as for lm-eval's `hf`
        dtype       `float32`, `bfloat16` or `float16`; None: the checkpoint's own, and float32
                    with `dequantized`
        options     of `KNOWN`, as lm-eval's `hf` has them

        Raises UnicompError for an option that there is not, and what loading raises.
        """
        if unknown := sorted(set(options) - KNOWN):
            raise UnicompError(
                f"the model `{NAME}` has no argument `{unknown[0]}`",
                hint=f"it takes pretrained, compute, dtype, backend, {', '.join(sorted(KNOWN))}",
            )
        if isinstance(pretrained, str):
            folder = hub.resolve(pretrained).folder
            tokenizer = tokenizer or text.tokenizer(folder)
            network = _load(pretrained, compute, dtype, backend, device)
        else:
            network = pretrained
        super().__init__(
            pretrained=network,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=1 if batch_size is None else batch_size,
            **options,
        )

    def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return logits [batch, tokens, vocab]; refuse what is no number, which argmax would hide.

        Raises UnicompError where a logit is NaN.
        """
        logits: Tensor = super()._model_call(inps, *args, **options)
        refuse_nan(logits)
        return logits

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return ids [batch, tokens], as lm-eval's `hf` has them, with the same refusal."""
        watch = LogitsProcessorList([Watch()])
        made: Tensor = super()._model_generate(context, *args, logits_processor=watch, **options)
        return made

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval notes of a model: parameters, dtype, how it computes."""
        info: dict[str, Any] = {
            "model_num_parameters": sum(own.numel() for own in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
        }
        if (how := getattr(self.model, "unicomp_loaded", None)) is not None:
            info["unicomp"] = how.to_json()
        return info


def _load(
    pretrained: str, compute: str, dtype: str | None, backend: str | None, device: str | None
) -> PreTrainedModel:
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(f"no dtype `{dtype}`", hint=f"use one of {', '.join(DTYPES)}")
    kind = None if dtype is None else DTYPES[dtype]
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"  # lm-eval's command asks for a GPU unless told otherwise
    if compute == DEQUANTIZED:
        folder = hub.resolve(pretrained).folder
        dense = load(folder, dtype=kind or torch.float32)
        if device is not None:
            torch.nn.Module.to(dense, device)  # in place
        return dense
    return packed_model.load(
        pretrained,
        device=device,
        backend=backend,
        compute=compute,  # type: ignore[arg-type]
        dtype=kind,
    )


model_registry.register(NAME)(Unicomp)
