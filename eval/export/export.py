"""Write a checkpoint as a model folder that transformers (or fla) loads without lrnn.

The folder is read back before it appears under its name: with lrnn, and in a process that cannot import it; its logits
must be those of the trained model.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrnn.environment import PACKAGE
from lrnn.errors import UserError
from lrnn.files import new_folder

if TYPE_CHECKING:
    import torch

    from lrnn import LrnnConfig, LrnnForCausalLM
    from lrnn.tokenizer import Tokenizer

AUTO_MAP = {
    "AutoConfig": "configuration_lrnn.LrnnConfig",
    "AutoModel": "modeling_lrnn.LrnnModel",
    "AutoModelForCausalLM": "modeling_lrnn.LrnnForCausalLM",
}
CODE = ("model", "kernels/reference")  # folders of the package whose files an exported folder holds, side by side
EXAMPLES = """examples:
  lrnn export runs/340m exports/340m                       # the newest intact checkpoint of a run
  lrnn export runs/340m/checkpoints/step-00010000 exports/340m-10k --dtype bfloat16
  lrnn export runs/340m exports/340m-fla --format fla      # for flash-linear-attention
  lrnn export --from-fla downloads/gdn-1.3b exports/gdn    # the other way"""


@dataclass
class Trained:
    """A trained model and what is known of it."""

    model: "LrnnForCausalLM"  # float32, on the CPU
    tokenizer: "Tokenizer"
    training: dict[str, Any]  # `lrnn_training` of the exported config.json
    data: dict[str, Any] | None = None  # the checkpoint's description of its data
    run: dict[str, Any] | None = None  # the run's resolved configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run folder, checkpoint folder or, with --from-fla, model folder of fla")
    parser.add_argument("out", help="folder to write; must be new or empty")
    parser.add_argument("--format", choices=("hf", "fla"), default="hf", help="default hf")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights; default float32")
    parser.add_argument("--license", metavar="SPDX", help="licence that the model card names, such as apache-2.0")
    parser.add_argument(
        "--tokenizer", help="SentencePiece .model or tokenizer folder, for a source that keeps none (a streamed run)"
    )
    parser.add_argument("--from-fla", action="store_true", help="convert a model folder of fla to the hf format")
    parser.epilog = EXAMPLES


def main(args: argparse.Namespace) -> None:
    if args.from_fla and args.format == "fla":
        raise UserError("--from-fla writes the hf format; leave out --format fla")
    out = Path(args.out)
    check_out(out)  # before the checkpoint is read
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # one would be drawn into the log file
    read = read_fla_folder if args.from_fla else read_checkpoint
    export(read(Path(args.source), args.tokenizer), out, args.format, args.dtype, args.license)


def check_out(out: Path) -> None:
    """Raises UserError where `out` is anything but absent or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; an export is written into a new one")


def read_checkpoint(source: Path, tokenizer: str | None = None) -> Trained:
    """Read a checkpoint: `source` itself, or the newest intact one of a run folder.

    Args:
        tokenizer: where its tokenizer is, for a checkpoint without one.

    Raises:
        UserError: `source` is neither; the checkpoint is incomplete or damaged; its tokenizer is missing or unfit.
    """
    import yaml

    from lrnn import LrnnConfig
    from lrnn.pretrain.checkpoint import format as checkpoint

    if (source / "checkpoints").is_dir():
        newest = checkpoint.find_newest(source, warn=say)
        if newest is None:
            raise UserError(f"{source} has no complete checkpoint yet")
        source = newest
        say(f"reading {source}")
    elif checkpoint.NAME.match(source.name) or any(source.glob("state-*.safetensors")):
        say(f"reading {source}")
        checkpoint.verify(source)
    else:
        raise UserError(f"{source} is neither a run folder nor a checkpoint (a folder named step-NNNNNNNN)")
    known = LrnnConfig().to_dict()  # a stranger's further fields, some of which name code, are not passed on
    fields = json.loads((source / "config.json").read_text())
    config = LrnnConfig(**{name: value for name, value in fields.items() if name in known})
    progress = checkpoint.read_progress(source)
    trained_tokenizer = _tokenizer_of(source, progress["data"], tokenizer)
    _check_vocabulary(trained_tokenizer, config)
    model = empty_model(config)
    checkpoint.SavedState(source).load_into(model)
    files = json.loads((source / "manifest.json").read_text())["files"]
    training = {
        "step": progress["step"],
        "tokens": progress["progress"]["tokens"],
        "seed": progress["data"]["seed"],
        "run_config_sha256": files["run.yaml"]["sha256"],
        "tokenizer_sha256": trained_tokenizer.fingerprint,
    }
    try:
        run = yaml.safe_load((source / "run.yaml").read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{source / 'run.yaml'} is no plain YAML: {' '.join(str(error).split())}") from None
    return Trained(model, trained_tokenizer, training, progress["data"], run)


def read_fla_folder(source: Path, tokenizer: str | None = None) -> Trained:
    """Read a model folder of fla. Raises UserError as `from_fla` and `load_tokenizer` do."""
    from lrnn.eval.export.fla_format import from_fla
    from lrnn.tokenizer import load_tokenizer

    say(f"reading {source}")
    config, state = from_fla(source)
    trained_tokenizer = load_tokenizer(source if tokenizer is None else tokenizer)
    _check_vocabulary(trained_tokenizer, config)
    model = empty_model(config)
    # A tied head is not in the file; from_fla has compared the names.
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    known = getattr(config, "lrnn_training", {})
    return Trained(model, trained_tokenizer, {**known, "tokenizer_sha256": trained_tokenizer.fingerprint})


def export(
    trained: Trained, out: Path, export_format: str = "hf", dtype: str = "float32", license: str | None = None
) -> float | None:
    """Write the folder `out`, and read it back. The model of `trained` is rounded to `dtype` in place.

    Returns:
        The largest difference between the logits of the folder, computed in `dtype`, and those of the trained float32
        model; None for the fla format, of which names, shapes and values are compared (fla computes on a GPU alone).

    Raises:
        UserError: `out` is not empty; the tokenizer cannot be converted; fla's format does not have the mixer.
        RuntimeError: what was written does not load, or gives other logits. Nothing is left at `out` then.
    """
    import torch

    from lrnn.eval.export.check import check_hf_folder, logits, sample_batch
    from lrnn.eval.export.fla_format import check_fla_folder, to_fla_config
    from lrnn.eval.export.tokenizer import export_tokenizer

    model = trained.model.eval()
    if export_format == "fla":
        to_fla_config(model.config)  # refuses a mixer before anything is written
    check_out(out)
    with new_folder(out) as folder:
        tokenizer = export_tokenizer(trained.tokenizer, folder)
        say(f"tokenizer of {trained.tokenizer.vocab_size:,} pieces: ids compared on real text, equal")
        batch = sample_batch(trained.tokenizer)
        trained_logits = logits(model, batch)
        round_weights(model, getattr(torch, dtype))
        say(f"writing {model.num_parameters() / 1e6:.1f}M parameters in {dtype}")
        write_weights(model, folder)
        _write_texts(trained, folder, out.name, tokenizer.pad_token_id, export_format, dtype, license)
        if export_format == "fla":
            say("reloading with fla")
            check_fla_folder(folder, model)
            difference = None
        else:
            difference = check_hf_folder(folder, model, trained.tokenizer, trained_logits, batch)
    if difference is None:
        say(f"{out}: fla reads the names, shapes and values of the trained model")
    else:
        say(f"{out}: logits in {dtype} differ from the trained model's by at most {difference:.2g}")
    return difference


def empty_model(config: "LrnnConfig") -> "LrnnForCausalLM":
    """A float32 model on the CPU whose weights are not set yet."""
    import torch

    from lrnn import LrnnForCausalLM

    with torch.device("meta"):
        model = LrnnForCausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    return model


def round_weights(model: "LrnnForCausalLM", dtype: "torch.dtype") -> None:
    """Cast the weights in place, but for the gates that stay float32 whatever the dtype of the model."""
    kept = tuple(f".{name}" for name in model._keep_in_fp32_modules_strict)
    for name, parameter in model.named_parameters():
        if not name.endswith(kept):
            parameter.data = parameter.data.to(dtype)


def write_weights(model: "LrnnForCausalLM", folder: Path) -> None:
    """Write model.safetensors, in shards with an index above 5 GB; a tied head is not written a second time."""
    from huggingface_hub import save_torch_state_dict

    state = dict(model.named_parameters())  # each tensor once, whatever its names
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})


def code_files() -> list[Path]:
    """Return the files of code that an exported folder holds: all of them, whatever the model's mixer."""
    files = [file for folder in CODE for file in sorted((PACKAGE / folder).glob("*.py"))]
    return [file for file in files if file.name != "__init__.py"]


def say(line: str) -> None:
    print(line, flush=True)


def _write_texts(
    trained: Trained, folder: Path, name: str, pad_token_id: int, export_format: str, dtype: str, license: str | None
) -> None:
    """Everything but weights and tokenizer: configurations, code, card."""
    import transformers

    from lrnn.eval.export.fla_format import to_fla_config
    from lrnn.eval.export.model_card import model_card

    config = trained.model.config
    config.bos_token_id, config.eos_token_id = trained.tokenizer.bos_token_id, trained.tokenizer.eos_token_id
    config.lrnn_training = trained.training
    if export_format == "fla":
        content = to_fla_config(config) | {"lrnn_training": trained.training}
    else:
        config.pad_token_id = pad_token_id
        config.architectures = [type(trained.model).__name__]
        # A field that equals transformers' default is left out by to_diff_dict, but may differ from LrnnConfig's.
        explicit = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        content = config.to_diff_dict() | {name: getattr(config, name) for name in explicit} | {"auto_map": AUTO_MAP}
        for file in code_files():
            shutil.copyfile(file, folder / file.name)
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
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _tokenizer_of(source: Path, data: dict[str, Any], given: str | None) -> "Tokenizer":
    from lrnn.tokenizer import load_tokenizer

    if (source / "tokenizer").is_dir():
        if given is not None:
            raise UserError(f"--tokenizer {given}: {source} keeps the tokenizer it was trained with; leave it out")
        return load_tokenizer(source / "tokenizer")
    if given is None:
        raise UserError(
            f"{source} keeps no tokenizer: it was trained from a stream; "
            f"give the one it was trained with: --tokenizer {data['stream']['tokenizer']}"
        )
    return load_tokenizer(given)


def _check_vocabulary(tokenizer: "Tokenizer", config: "LrnnConfig") -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer's vocabulary of {tokenizer.vocab_size} exceeds the model's vocab_size {config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
