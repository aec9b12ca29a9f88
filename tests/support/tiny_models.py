"""Write tiny random models in the form of exports, with tokenizers trained for them."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Sentences are cut out, and so are the words before an answer: no token has parts of a question and of its answer.
SENTENCE, BEFORE_ANSWER = r"[^.:\n]*[.:]", r"(is|cup|room|==)(?= |$)"


def write_tiny_model(folder: Path, texts: list[str], *, vocab_size: int = 300, sentences: bool = False) -> Path:
    """Write a random two-layer Llama with a byte-level tokenizer that is trained on `texts`, and return its folder.

    Args:
        sentences: let a token be as long as a sentence instead of a word, so that prompts like `texts` have few tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if sentences:
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (SENTENCE, BEFORE_ANSWER)]
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=2048, **size)
    config.bos_token_id, config.eos_token_id = 0, 1
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
