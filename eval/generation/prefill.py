"""Read a prompt in pieces, so that its activations take bounded memory however long it is."""

from typing import Any

from torch import Tensor

PIECE_TOKENS = 65_536  # tokens of a batch that are read at a time
CHUNK = 64  # tokens per chunk of the kernels: a piece that is a multiple of it costs no padding


def prefill(model: Any, input_ids: Tensor, attention_mask: Tensor | None, piece_tokens: int = PIECE_TOKENS) -> Any:
    """Return the model's output at the last token of each prompt, with the cache after it.

    A prompt of more than one piece passes its state from piece to piece, as generation passes it from token to token.

    Args:
        model: a model of lrnn with a head.
        input_ids: int64 [B, T], with padding on the left.
        attention_mask: [B, T], 1 at tokens and 0 at padding, or None.
        piece_tokens: tokens of the batch that are read at a time, at least 64 per sequence.

    Returns:
        `CausalLMOutputWithPast` with logits [B, 1, vocab].
    """
    B, T = input_ids.shape
    length = max(piece_tokens // B // CHUNK * CHUNK, CHUNK)
    cache, output = None, None
    for start in range(0, T, length):
        piece = slice(start, start + length)
        mask = None if attention_mask is None else attention_mask[:, piece]
        output = model(
            input_ids[:, piece], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
    return output
