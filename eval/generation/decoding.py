"""Greedy decoding on CUDA graphs, in the form that transformers' `generate` takes."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from lrnn.eval.generation.prefill import prefill
from lrnn.eval.generation.steps import DecodingSteps
from lrnn.model.configuration_lrnn import LrnnConfig

TOKENS_PER_REPLAY = 8  # a row that is finished computes up to as many tokens in vain


class GraphDecoding:
    """Greedy decoding of a model of lrnn, several tokens per launch:

        decoding = GraphDecoding(model)
        model.generate(**inputs, max_new_tokens=256, custom_generate=decoding)

    The tokens are those of `generate` without it. The graph of a batch size is kept until another batch size or, with
    attention, a longer text comes, so the object should be kept as long as the model.

    Args:
        model: a `LrnnForCausalLM`.
        tokens_per_replay: tokens between two looks at what was generated; default 8 on a GPU, and 1 on a CPU, where
            there is no launch to save.

    Raises:
        ValueError: the model is not one of lrnn.
    """

    def __init__(self, model: Any, tokens_per_replay: int | None = None):
        if not is_of_lrnn(model):
            raise ValueError(f"GraphDecoding needs a model of lrnn; this one is of {model.config.model_type}")
        self.tokens_per_replay = tokens_per_replay or (TOKENS_PER_REPLAY if model.device.type == "cuda" else 1)
        self._steps: DecodingSteps | None = None

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Tensor:
        """Return prompts and generated tokens, int64 [B, T + new], rows padded behind their end. `generate` calls it.

        Raises:
            ValueError: `generate` was asked for something other than the most likely token.
        """
        refuse_other_modes(logits_processor, generation_config, kwargs)
        out = prefill(model, input_ids, kwargs.get("attention_mask"))
        token = out.logits[:, -1].float().argmax(-1, keepdim=True)
        text = Text(input_ids, stopping_criteria, generation_config)
        tokens = text.most_tokens + self.tokens_per_replay
        if self._steps is None or self._steps.batch_size != len(token):
            self._steps = None  # frees the old graph first
            self._steps = DecodingSteps(model, out.past_key_values, token, self.tokens_per_replay, tokens)
        else:
            self._steps.start(out.past_key_values, token, tokens)
        del out
        finished = text.extend(token)
        while not finished:
            finished = text.extend(self._steps.run())
        return text.ids()


class Text:
    """The tokens of a batch on the host, which grow until the stopping criteria hold, exactly as in `generate`."""

    def __init__(self, prompt: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig):
        self._device, self._criteria = prompt.device, criteria
        self._length = prompt.shape[1]
        self.most_tokens = criteria.max_length or 2 * self._length  # may be exceeded if the criteria set no length
        room = self.most_tokens - self._length
        self._ids = torch.cat([prompt.cpu(), prompt.new_zeros(prompt.shape[0], room, device="cpu")], 1)
        self._unfinished = torch.ones(prompt.shape[0], dtype=torch.bool)
        # As in `generate`, rows are padded only if something ends them one by one.
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._pad = int(config._pad_token_tensor) if ends else None

    def extend(self, tokens: Tensor) -> bool:
        """Append tokens [B, n], up to the one with which the last row is finished. Return whether all are finished."""
        for token in tokens.cpu().unbind(1):
            if self._length == self._ids.shape[1]:
                self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)], 1)
            if self._pad is not None:
                token = token.where(self._unfinished, self._pad)
            self._ids[:, self._length] = token
            self._length += 1
            self._unfinished &= ~self._criteria(self._ids[:, : self._length], None)
            if not self._unfinished.any():
                return True
        return False

    def ids(self) -> Tensor:
        """Return prompts and generated tokens, int64 [B, T + new], on the device of the prompts."""
        return self._ids[:, : self._length].to(self._device)


def is_of_lrnn(model: Any) -> bool:
    """Return whether the model is one of lrnn, with lrnn's own code."""
    return isinstance(model.config, LrnnConfig)


def refuse_other_modes(processors: LogitsProcessorList, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless `generate` was asked for the most likely token from a fresh state."""
    asked = {
        "do_sample": config.do_sample,
        "num_beams": config.num_beams not in (None, 1),
        "return_dict_in_generate": config.return_dict_in_generate,
        "streamer": kwargs.get("streamer") is not None,
        "past_key_values": kwargs.get("past_key_values") is not None,
        "inputs_embeds": kwargs.get("inputs_embeds") is not None,
        ", ".join(type(processor).__name__ for processor in processors): len(processors) > 0,
    }
    for name, given in asked.items():
        if given:
            raise ValueError(f"GraphDecoding chooses the most likely token; leave out {name} or custom_generate")
