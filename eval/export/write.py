"""Write the exported folder: weights, configuration, code, tokenizer and model card; and read it back."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from huggingface_hub import save_torch_state_dict

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.eval.export.check import check_class_folder, check_hf_folder, logits, sample_batch
from lrnn.eval.export.check_fla import check_fla_folder
from lrnn.eval.export.model_card import model_card
from lrnn.eval.export.read import Trained
from lrnn.eval.export.tokenizer import export_tokenizer
from lrnn.eval.suites.card_results import copy_results
from lrnn.files import new_folder, use_default_mode
from lrnn.formats.fla import to_fla_config
from lrnn.formats.olmo_hybrid import olmo_names, to_olmo_config
from lrnn.model.code_files import AUTO_MAP, write_code
from lrnn.tokenizer import Tokenizer


def without_progress_bars() -> None:
    """Keep transformers from drawing progress bars into a log file."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def check_out(out: Path) -> None:
    """Raise UserError unless `out` is absent or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; an export is written into a new one")


def export(
    trained: Trained, out: Path, export_format: str = "hf", dtype: str = "float32", license: str | None = None
) -> float | None:
    """Write the folder `out`, and read it back. The model of `trained` is rounded to `dtype` in place.

    Args:
        trained: the model and what is known about it.
        out: the folder; must be absent or empty.
        export_format: "hf", "fla" or "olmo_hybrid".
        dtype: dtype of the weights, "float32" or "bfloat16".
        license: SPDX identifier for the model card, or None.

    Returns:
        The largest difference between the logits of the folder, computed in `dtype`, and those of the trained float32
        model. None for the fla format, which is compared by names, shapes and values because fla computes only on a
        GPU.

    Raises:
        UserError: `out` is not empty, the tokenizer cannot be converted, or the format cannot express the model.
        RuntimeError: the folder does not load, or gives other logits. Nothing is left at `out` then.
    """
    model = trained.model.eval()
    if export_format == "fla":
        to_fla_config(model.config)  # refuses an unknown mixer before anything is written
    elif export_format == "olmo_hybrid":
        to_olmo_config(model.config)  # in the same way
    check_out(out)
    with new_folder(out) as folder:
        tokenizer = export_tokenizer(trained.tokenizer, folder)
        size = trained.tokenizer.vocab_size
        print(f"tokenizer of {size:,} pieces: gives the ids of the original on real text", flush=True)
        batch = sample_batch(trained.tokenizer)
        trained_logits = logits(model, batch)
        round_weights(model, getattr(torch, dtype))
        print(f"writing {model.num_parameters() / 1e6:.1f}M parameters in {dtype}", flush=True)
        names = olmo_names(model, to_olmo_config(model.config)) if export_format == "olmo_hybrid" else None
        write_weights(model, folder, names)
        _write_texts(trained, folder, out.name, tokenizer.pad_token_id, export_format, dtype, license)
        if trained.results is not None:
            copy_results(trained.results, folder)
        if export_format == "fla":
            print("reloading with fla", flush=True)
            check_fla_folder(folder, model)
            difference = None
        elif export_format == "olmo_hybrid":
            difference = check_class_folder(folder, model, trained.tokenizer, trained_logits, batch)
        else:
            difference = check_hf_folder(folder, model, trained.tokenizer, trained_logits, batch)
    if difference is None:
        print(f"{out}: fla reads the names, shapes and values of the trained model", flush=True)
    else:
        print(f"{out}: logits in {dtype} differ from the trained model's by at most {difference:.2g}", flush=True)
    return difference


def round_weights(model: LrnnForCausalLM, dtype: torch.dtype) -> None:
    """Cast the weights in place, except the gates, which stay float32 in a model of any dtype."""
    kept = tuple(f".{name}" for name in model._keep_in_fp32_modules_strict)
    for name, parameter in model.named_parameters():
        if not name.endswith(kept):
            parameter.data = parameter.data.to(dtype)


def write_weights(model: LrnnForCausalLM, folder: Path, names: Mapping[str, str] | None = None) -> None:
    """Write model.safetensors, in shards with an index above 5 GB; a tied head is not written a second time.

    Args:
        model: its parameters are written as they are.
        folder: where to write.
        names: the name in the file of each parameter, or None for its own.
    """
    # Every tensor once, even under two names.
    state = {name if names is None else names[name]: parameter for name, parameter in model.named_parameters()}
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    for file in folder.glob("*.safetensors"):
        use_default_mode(file)


def set_tokens(config: LrnnConfig, tokenizer: Tokenizer) -> None:
    """Let a configuration name the tokens that begin and end a document."""
    (config.bos_token_id,) = tokenizer.document_prefix  # where the tokenizer has no bos, this is its eos
    config.eos_token_id = tokenizer.eos_token_id


def _write_texts(
    trained: Trained, folder: Path, name: str, pad_token_id: int, export_format: str, dtype: str, license: str | None
) -> None:
    """Write everything except weights and tokenizer: configurations, code and model card."""
    config = trained.model.config
    set_tokens(config, trained.tokenizer)
    config.lrnn_training = trained.training
    if export_format == "fla":
        content = to_fla_config(config) | {"lrnn_training": trained.training}
    elif export_format == "olmo_hybrid":
        content = to_olmo_config(config, pad_token_id) | {"lrnn_training": trained.training}
    else:
        config.pad_token_id = pad_token_id
        config.architectures = [type(trained.model).__name__]
        # to_diff_dict leaves out fields that equal transformers' default, which may differ from LrnnConfig's.
        explicit = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        content = config.to_diff_dict() | {name: getattr(config, name) for name in explicit} | {"auto_map": AUTO_MAP}
        write_code(folder)
    content |= {"dtype": dtype, "transformers_version": transformers.__version__}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": pad_token_id}
    transformers.GenerationConfig(**tokens).save_pretrained(folder)
    card = model_card(
        name,
        config,
        export_format=export_format,
        dtype=dtype,
        num_parameters=trained.model.num_parameters(),
        training=trained.training,
        data=trained.data,
        run=trained.run,
        license=license,
        origin=trained.origin,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
