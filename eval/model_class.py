"""Import a model's class so that it computes on the device where it is evaluated."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

GPU_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")  # their kernels run on GPUs alone


def import_class(model_type: str, device: str) -> None:
    """Import transformers' class of a type of model; for a CPU, with its own functions in place of kernels for GPUs.

    Classes of recurrent models, such as `olmo_hybrid`, choose between the two when they are imported, and take kernels
    wherever their package is installed: on a CPU they would fail.

    Args:
        model_type: that of the model's `config.json`. For one that transformers has no class of, nothing is done.
        device: where the model will compute.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    if device.split(":")[0] == "cpu" and model_type in CLASSES:
        with hidden(GPU_PACKAGES):
            getattr(transformers, CLASSES[model_type])


@contextmanager
def hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Let imports of packages fail meanwhile."""
    loaded = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]  # None makes an import fail
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(loaded)
