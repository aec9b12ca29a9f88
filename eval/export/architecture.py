"""The part of a model card that describes the model: its mixers, sizes and state."""

from lrnn import LrnnConfig
from lrnn.model.mixers import MIXERS


def architecture(config: LrnnConfig, dtype: str, num_parameters: int) -> str:
    """Return a sentence and a table that describe a model, in Markdown.

    Args:
        config: the model's configuration.
        dtype: dtype of the weights.
        num_parameters: number of parameters of the model.
    """
    sizes = {
        "parameters": f"{num_parameters:,} ({num_parameters / 1e6:.1f}M), {dtype}",
        "layers, hidden size": f"{config.num_hidden_layers}, {config.hidden_size}",
    }
    if config.is_hybrid:
        rows = {
            f"layer{'s' * (len(numbers) > 1)} {in_words(numbers)}": "; ".join(
                [_mixer(layer), *(f"{name}: {value}" for name, value in (_range(layer) | _heads(layer)).items())]
            )
            for layer, numbers in config.kinds_of_layers()
        }
        rows |= sizes
    else:
        layer = config.layer(0)
        rows = {"token mixer": _mixer(layer)} | _range(layer) | sizes | _heads(layer)
    layers = [config.layer(i) for i in range(config.num_hidden_layers)]
    state = sum(_state(layer) or 0 for layer in layers if not _attends(layer))
    if state:
        rows["recurrent state"] = f"{state:,} numbers per sequence"
    rows |= {
        "SwiGLU size": str(config.intermediate_size),
        "vocabulary": f"{config.vocab_size:,}{', tied embeddings' if config.tie_word_embeddings else ''}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"{_sentence(config)}\n\n| | |\n|---|---|\n{table}"


def tags(config: LrnnConfig) -> list[str]:
    """Return the hub's tags of a model: its kind and its mixers."""
    kind = "hybrid" if config.is_hybrid else MIXERS[config.mixers[0]].kind.replace(" ", "-")
    return [kind, *dict.fromkeys(config.mixers)]


def in_words(numbers: list[int]) -> str:
    """Return ascending numbers with ranges, such as "0-2, 4"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _sentence(config: LrnnConfig) -> str:
    kind = MIXERS[config.mixers[0]].kind.replace("rnn", "RNN")
    growing = sum(_state(config.layer(i)) is None for i in range(config.num_hidden_layers))
    if growing == config.num_hidden_layers:
        return f"This is a {kind}, trained for comparison with linear RNNs. Its cache grows with the text."
    if growing:
        return (
            f"This is a hybrid: the cache of {growing} of its {config.num_hidden_layers} layers grows with the text, "
            "the others keep a state of fixed size."
        )
    attends = sum(_attends(config.layer(i)) for i in range(config.num_hidden_layers))
    if attends == config.num_hidden_layers:
        return f"This is a {kind}, trained for comparison with linear RNNs. Its cache holds a window of the text."
    if attends:
        return (
            f"This is a hybrid: {attends} of its {config.num_hidden_layers} layers attend to a window of the text, the "
            "others keep a state of fixed size."
        )
    if config.is_hybrid:
        return "This is a hybrid of RNNs: it keeps a state of fixed size and has no attention."
    return f"This is a {kind}: it keeps a state of fixed size and has no attention."


def _mixer(layer: LrnnConfig) -> str:
    mixer = MIXERS[layer.mixer]
    return f"{mixer.title} (arXiv:{mixer.paper})"


def _range(layer: LrnnConfig) -> dict[str, str]:
    ranges = MIXERS[layer.mixer].ranges
    if ranges is None:
        return {}
    low, how = (-1, ranges.negative) if layer.allow_neg_eigval else (0, ranges.positive)
    return {"eigenvalues of the state transition": f"[{low}, 1]: {how} (arXiv:2411.12537)"}


def _heads(layer: LrnnConfig) -> dict[str, str]:
    mixer = MIXERS[layer.mixer]
    rows = {"heads, head dimension": f"{layer.num_heads}, {layer.head_dim}", **mixer.details(layer)}
    if mixer.cost(layer).channels:
        rows["short convolution"] = f"{layer.conv_size} taps"
    return rows


def _attends(layer: LrnnConfig) -> bool:
    return MIXERS[layer.mixer].kind == "transformer"


def _state(layer: LrnnConfig) -> int | None:
    return MIXERS[layer.mixer].cost(layer).state
