"""Tasks become requests to the model, once, before it is loaded: settings, few-shot examples, lengths."""

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lrnn.errors import UserError
from lrnn.eval.suites.request import Request
from lrnn.eval.suites.suites import WHOLE_PROMPTS
from lrnn.eval.suites.task_objects import Loaded

GENERATED = 256  # lm-eval's Hugging Face model generates so many tokens unless a task says otherwise
AROUND = 8  # the context can change how an answer's first characters are tokenised


def seed(request: Request) -> None:
    """Seed what tasks draw from while they are loaded, as lm-eval does before it loads them."""
    of_random, of_numpy, of_torch, _ = request.seeds
    if of_random is not None:
        random.seed(of_random)
    if of_numpy is not None:
        np.random.seed(of_numpy)
    if of_torch is not None:
        torch.manual_seed(of_torch)


def compile_templates_once() -> None:
    """Let lm-eval compile each Jinja template once per process, instead of once per document and example.

    Building the prompts of GSM8K with eight examples takes 0.6 CPU-seconds with it, and 47 without.
    """
    from lm_eval import utils

    if not hasattr(utils.env.from_string, "cache_info"):
        utils.env.from_string = functools.lru_cache(maxsize=1024)(utils.env.from_string)


def build(
    loaded: Loaded, request: Request, render: Callable[..., str] | None, rank: int = 0, world_size: int = 1
) -> None:
    """Set what the user asked for, and build the requests of every task as lm-eval does. `lm_eval` then takes these.

    Args:
        render: function that renders a conversation, or None without a chat template.
        rank, world_size: the share of the documents.

    Raises:
        UserError: a task cannot be as it was asked for.
    """
    from lm_eval.evaluator_utils import get_sample_size

    compile_templates_once()
    for name, task in loaded.tasks.items():
        _set(name, task, request)
    for name, task in loaded.tasks.items():
        options: dict[str, Any] = {"system_instruction": request.system_instruction, "chat_template": render}
        options |= {"apply_chat_template": render is not None, "fewshot_as_multiturn": request.multiturn}
        options |= {"rank": rank, "world_size": world_size, "limit": get_sample_size(task, request.limit)}
        try:
            task.build_all_requests(**options)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the prompts of the task {name!r} cannot be built: {error}") from error
        _check_answers(name, task)
        task.build_all_requests = functools.partial(_built, name)


def _built(name: str, **_: Any) -> None:
    """Stand in for a task's `build_all_requests`, which would build everything again with other draws."""


def _check_answers(name: str, task: Any) -> None:
    """Raise UserError if an answer to score is empty, which has no likelihood. lm-eval finds this while it runs."""
    for instance in task.instances:
        if instance.request_type == "loglikelihood" and not instance.args[1]:
            raise UserError(
                f"the task {name!r}: an answer of document {instance.doc_id} is empty; its file may be wrong"
            )


def _set(name: str, task: Any, request: Request) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {name!r} shows images or plays sound; lrnn evaluates language models")
    if request.gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(request.gen_kwargs), update=True)
    fixed = task.get_config("num_fewshot")
    if request.num_fewshot is not None and fixed == 0 != request.num_fewshot:
        print(f"{name}: its file says num_fewshot: 0, so it has no examples", flush=True)
    elif request.num_fewshot is not None or fixed is None:
        task.set_config(key="num_fewshot", value=request.num_fewshot or 0)
    _check_examples(name, task)
    task.set_fewshot_seed(seed=request.seeds[3])


def _check_examples(name: str, task: Any) -> None:
    """Raise UserError if there are fewer few-shot examples than wanted, before lm-eval draws them."""
    wanted, sampler = task.get_config("num_fewshot") or 0, getattr(task, "sampler", None)
    if wanted and sampler is not None:
        there = len(getattr(sampler, "fewshot_indices", None) or sampler.df)
        if there < wanted:
            raise UserError(f"--num-fewshot {wanted}: the task {name!r} has {there} examples to draw from")


@dataclass(frozen=True)
class Need:
    """The tokens of context that a task needs.

    Attributes:
        tokens: of its longest request.
        what: which tokens these are, as the verb of a message.
        cut: how many of its requests can be cut to fit; 0 if cutting does not help.
    """

    tokens: int
    what: str
    cut: int = 0


def check_lengths(loaded: Loaded, tokenizer: Any, first: int, max_length: int, request: Request) -> dict[str, int]:
    """Check that requests fit into `max_length` tokens, and return by task how many will be cut to fit.

    lm-eval cuts a prompt that is too long from the left. That changes what a task asks, so it is refused unless the
    user allows it, or a suite has no objection. What must fit anyway is the answer, or the tokens to generate.

    Args:
        first: the number of ids that the rule for bos puts in front of a prompt.

    Raises:
        UserError: a request does not fit, and must not be cut.
    """

    def whole(name: str) -> bool:
        return name in WHOLE_PROMPTS if request.suite else not request.truncate

    needs, cut = [], {}
    for name, task in loaded.tasks.items():
        for need in _needs(task, tokenizer, first, max_length):
            if need.tokens <= max_length:
                continue
            if need.cut and not whole(name):
                cut[name] = need.cut
            else:
                needs.append((need, name))
    if not needs:
        return cut
    need, name = max(needs, key=lambda item: item[0].tokens)
    longer = f"give --max-length {max(2048, need.tokens)} (a linear RNN has no hard limit of its own)"
    if request.tasks and all(need.cut for need, _ in needs):
        longer += f", or --truncate to cut {sum(need.cut for need, _ in needs)} requests from the left as lm-eval does"
    raise UserError(
        f"{name} {need.what} up to {need.tokens} tokens, more than the model's max_position_embeddings or "
        f"--max-length, {max_length}: {longer}"
    )


def _needs(task: Any, tokenizer: Any, first: int, max_length: int) -> Iterator[Need]:
    """Yield what a task needs.

    A text with fewer bytes than there is room for tokens fits, because no token is empty. It is not tokenised.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    pairs, answers, prompts = set(), set(), set()
    for instance in task.instances:
        if instance.request_type == "loglikelihood":
            context, continuation = instance.args
            answers.add(continuation)
            pairs.add(context + continuation)
        elif instance.request_type == "generate_until":
            context, settings = instance.args
            prompts.add((context, normalize_gen_kwargs(dict(settings), GENERATED)["max_gen_toks"]))

    def lengths(texts: Iterable[str], extra: int) -> list[int]:
        candidates = [text for text in texts if len(text.encode()) + 1 + extra > max_length]
        ids = tokenizer(candidates, add_special_tokens=False)["input_ids"] if candidates else []
        return [len(of_text) + extra for of_text in ids]

    yield Need(max(lengths(answers, AROUND), default=0), "has gold answers of")
    for generated in sorted({generated for _, generated in prompts}):
        yield Need(generated + 1, "generates")
    found = lengths(pairs, first - 1)  # nothing follows the last token
    for generated in sorted({generated for _, generated in prompts}):
        texts = [context for context, of_context in prompts if of_context == generated]
        found += lengths(texts, first + generated)
    yield Need(max(found, default=0), "has prompts with answers of", sum(length > max_length for length in found))
