"""Continue prompts: read them, and write what the model says after each."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from lrnn import LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.eval.documents import usable
from lrnn.eval.generation.decoding import GraphDecoding
from lrnn.pretrain.watch.settings import SamplesConfig


def read_prompts(settings: SamplesConfig) -> list[str]:
    """Return the prompts that the settings give or name.

    Raises:
        UserError: the file cannot be read, holds none, or has a row that is not as it should be.
    """
    if settings.prompt_file is None:
        return settings.prompts
    path = Path(settings.prompt_file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028 within a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"samples.prompt_file {path} cannot be read: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        numbered = [(number, _text_of(line, f"samples.prompt_file {path}, line {number}")) for number, line in numbered]
    if not numbered:
        raise UserError(f"samples.prompt_file {path} holds no prompt; it should have one in each line")
    return [text for _, text in numbered]


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not (isinstance(text, str) and text):
        raise UserError(f'{where} should be a row {{"text": ...}} with a text, not {line[:80]}')
    return usable(text, where)


def encode(tokenizer: Any, prompt: str, first: tuple[int, ...]) -> list[int]:
    """Return the ids of a prompt, behind those that begin a document."""
    return [*first, *tokenizer.encode(prompt, add_special_tokens=False)]


def write_on(
    model: LrnnForCausalLM,
    decoding: GraphDecoding,
    tokenizer: Any,
    ids: list[int],
    settings: SamplesConfig,
    seed: tuple[int, ...],
) -> str:
    """Return the text that the model writes after some ids, up to the end of the document.

    Args:
        model: the model.
        decoding: generates at a temperature of 0.
        tokenizer: turns ids into text.
        ids: the prompt.
        settings: how many tokens, and the temperature.
        seed: what random numbers follow from; they are needed above a temperature of 0 only.
    """
    prompt = torch.tensor([ids], device=model.device)
    options: dict[str, Any] = {"do_sample": False, "custom_generate": decoding}
    if settings.temperature > 0:
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:7], "big"))
        options = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    written = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
