"""Export to compressed-tensors: every scheme that we have goes over, see `kernels/formats/`."""

from unicomp.kernels.export_folder import FormatExport


class CompressedTensors(FormatExport):
    """`pack-quantized`, as `quantize` writes it."""

    name = "compressed-tensors"
    types = ("pack-quantized",)
