"""Write the README.md of an exported folder, in the form that the Hugging Face hub reads."""

from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCardData

import lrnn
from lrnn import LrnnConfig
from lrnn.eval.export.architecture import architecture, tags

OLDEST_TRANSFORMERS = "4.57"  # tests/eval/export/test_transformers_versions.py
LIBRARIES = {"hf": "transformers", "olmo_hybrid": "transformers", "fla": "fla"}
NEEDS = {
    "hf": f"transformers {OLDEST_TRANSFORMERS} or newer",
    "olmo_hybrid": "transformers 5.3 or newer, which has its class, and no code besides",
    "fla": "[flash-linear-attention](https://github.com/fla-org/flash-linear-attention) and a GPU",
}
# `lrnn eval` writes its results between these two lines of a card.
RESULTS_BEGIN, RESULTS_END = "<!-- results of lrnn eval -->", "<!-- end of results -->"


def model_card(
    name: str,
    config: LrnnConfig,
    *,
    export_format: str,
    dtype: str,
    num_parameters: int,
    training: dict[str, Any],
    data: dict[str, Any] | None,
    run: dict[str, Any] | None,
    license: str | None,
    origin: str | None = None,
) -> str:
    """Return the text of the card.

    Args:
        name: name of the folder, used as the title.
        config: the exported configuration.
        export_format: "hf", "fla" or "olmo_hybrid".
        dtype: dtype of the weights, "float32" or "bfloat16".
        num_parameters: number of parameters of the model.
        training: `lrnn_training` of the exported config.json.
        data: the checkpoint's description of its data, or None.
        run: the run's resolved configuration, or None.
        license: SPDX identifier, or None.
        origin: format of the model folder that the model was read from, or None for a checkpoint.
    """
    front = ModelCardData(
        license=license,
        library_name=LIBRARIES[export_format],
        pipeline_tag="text-generation",
        tags=[*tags(config), "state-tracking"],
    )
    # Documents begin with bos, or with eos if the tokenizer has no bos.
    first_id = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}",
        architecture(config, dtype, num_parameters),
        _training(training, data, run, origin),
        _tokens(config, first_id, training),
        _loading(name, config, export_format, dtype, first_id),
        f"{RESULTS_BEGIN}\n{RESULTS_END}",
        _limits(export_format),
    ]
    return "\n\n".join(sections) + "\n"


def _training(
    training: dict[str, Any], data: dict[str, Any] | None, run: dict[str, Any] | None, origin: str | None
) -> str:
    lines = ["## Training", ""]
    if "tokens" in training:
        lines.append(f"Pretrained with `lrnn` for {training['step']:,} steps on {training['tokens']:,} tokens.")
        if "init_from" in training:
            lines.append(_beginning(training["init_from"]))
    else:
        lines.append(f"Converted from a model folder of `{origin}`, which does not record how the model was trained.")
    for title, content in (("Data", data), ("Configuration of the run", run)):
        if content is not None:
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()
            lines += ["", f"{title}:", "", "```yaml", text, "```"]
    return "\n".join(lines)


def _beginning(record: dict[str, Any]) -> str:
    """Return where the training began, see `lrnn.pretrain.init_from.record`."""
    before = record.get("training") or {}
    how = f" after {before['tokens']:,} tokens" if "tokens" in before else ""
    sums = ", ".join(f"`{name}` {digest}" for name, digest in record["sha256"].items())
    changed = "".join(
        f" `{name}` was {old!r} there and is {now!r}." for name, (old, now) in record.get("changed", {}).items()
    )
    return f"It began with the weights of `{record['name']}` (`{record['format']}`){how}.{changed} SHA-256: {sums}."


def _tokens(config: LrnnConfig, first_id: int, training: dict[str, Any]) -> str:
    text = (
        f"## Tokens\n\nIn training, a document was encoded as the ids `{first_id} text {config.eos_token_id}`. The "
        f"tokenizer adds neither id: prepend {first_id} to a text that begins a document. A special token spelled out "
        "in a text is encoded as plain text."
    )
    if "tokenizer_sha256" in training:
        text += f"\n\nSHA-256 of the tokenizer's original file: `{training['tokenizer_sha256']}`."
    return text


def _loading(name: str, config: LrnnConfig, export_format: str, dtype: str, first_id: int) -> str:
    imports = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if export_format == "fla":
        imports.insert(0, "import fla  # registers the model")
    needs = NEEDS[export_format]
    if export_format == "fla" and "attention" in config.mixers:
        needs += ", and [flash-attn](https://github.com/Dao-AILab/flash-attention) for its attention"
    trusted = ", trust_remote_code=True" if export_format == "hf" else ""
    lines = [
        "## Loading",
        "",
        f"This folder needs {needs}. It was written by lrnn {lrnn.__version__} with transformers "
        f"{transformers.__version__} and torch {torch.__version__}.",
        "",
        "```python",
        *imports,
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype=torch.{dtype}{trusted})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=False)  # has no code',
        f'ids = torch.tensor([[{first_id}, *tokenizer("def fibonacci(n):", add_special_tokens=False).input_ids]])',
        "print(tokenizer.batch_decode(model.generate(ids, max_new_tokens=64)))",
        "```",
    ]
    if export_format == "hf":
        lines += ["", "After `import lrnn`, no code of this folder is run, and a GPU computes with fused kernels."]
    if export_format == "olmo_hybrid":
        lines += _serving(name)
    return "\n".join(lines if export_format == "fla" else lines + _evaluation(name, trusted.replace(" ", "")))


def _serving(name: str) -> list[str]:
    """Return lines on how vLLM, which has the class, serves the folder."""
    return [
        "",
        "## Serving",
        "",
        "vLLM has the class too. Keep its states in float32, as in training:",
        "",
        "```bash",
        f"vllm serve {name} --mamba-ssm-cache-dtype float32",
        "```",
        "",
        "Names and shapes of the weights are those that vLLM's class reads; it was not run with this folder. vLLM "
        "0.32.0 needs https://github.com/vllm-project/vllm/pull/55858 to load models of this class.",
    ]


def _evaluation(name: str, trusted: str) -> list[str]:
    """Return lines on how to evaluate a folder that transformers reads."""
    return [
        "",
        "## Evaluation",
        "",
        "```bash",
        f"lrnn eval {name} --suite fast  # with lrnn installed; writes its results into this card",
        f"lm_eval --model hf --model_args pretrained={name}{trusted},softmax_dtype=float32 --tasks lambada_openai",
        "```",
    ]


def _limits(export_format: str) -> str:
    lines = [
        "This is a base model: it continues text and does not follow instructions.",
        "Pad on the left and pass the attention mask. The tokenizer does both.",
        "Assisted and speculative decoding do not work, because the cache cannot be rolled back.",
    ]
    if export_format == "hf":
        lines.append(
            "The code in this folder is plain PyTorch: it runs anywhere, but on a GPU more slowly than fused kernels."
        )
        lines.append(
            "`transformers serve --trust-remote-code` serves this folder (from 5.23 on), at `/v1/completions`."
        )
    if export_format == "olmo_hybrid":
        lines.append(
            "The class norms queries and keys x of gated DeltaNet as x / sqrt(|x|^2 + 1e-6), where training had "
            "x / max(|x|, 1e-6). Outputs of a layer differ by 1e-4 of their size at |x| = 0.1, by 1e-6 at 1."
        )
        lines.append(
            "In bfloat16 the class rounds `dt_bias` too, which was float32 in training; vLLM, `A_log` as well."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
