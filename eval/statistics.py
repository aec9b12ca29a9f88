"""Statistics shared by the suites and by perplexity by position: metrics that are no means, bootstrap over documents.

D documents, K groups of tokens (bins of position), M models, R resamples.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

RESAMPLES = 1000
SEED = 0
INTERVAL = (0.025, 0.975)  # the quantiles of a 95% interval
BLOCK = 2**22  # size of a block of weights [resamples, D]: 32 MB of float64


def bits_per_byte(pairs: np.ndarray) -> np.ndarray:
    """Return the bits per byte over the axis n of (log-likelihood in nats, bytes) pairs `[..., n, 2]` float64.

    It is the ratio of the two sums, not the mean of the documents' ratios.
    """
    nats, n_bytes = pairs[..., 0].sum(-1), pairs[..., 1].sum(-1)
    return -nats / n_bytes / math.log(2)


def nats_per_token(pairs: np.ndarray) -> np.ndarray:
    """Return the loss over the axis n of (log-likelihood in nats, tokens) pairs `[..., n, 2]` float64."""
    return -pairs[..., 0].sum(-1) / pairs[..., 1].sum(-1)


def pairs_perplexity(pairs: np.ndarray) -> np.ndarray:
    """Return the perplexity over the axis n of (log-likelihood in nats, words or bytes) pairs `[..., n, 2]` float64."""
    return np.exp(-pairs[..., 0].sum(-1) / pairs[..., 1].sum(-1))


def perplexity(loglikelihoods: np.ndarray) -> np.ndarray:
    """Return exp of minus the mean over the axis n of log-likelihoods in nats `[..., n]` float64."""
    return np.exp(-loglikelihoods.mean(-1))


def given_answered(pairs: np.ndarray) -> np.ndarray:
    """Return the accuracy of what was answered over the axis n of (right, answered) pairs `[..., n, 2]`; 0 if none."""
    right, answered = pairs[..., 0].sum(-1), pairs[..., 1].sum(-1)
    return right / np.maximum(answered, 1)


# How the values of documents become the value of a metric. All others are means.
AGGREGATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bits_per_byte": bits_per_byte,
    "nats_per_token": nats_per_token,
    "byte_perplexity": pairs_perplexity,
    "word_perplexity": pairs_perplexity,
    "perplexity": perplexity,
    "given_answered": given_answered,
}


def aggregate(metric: str, values: np.ndarray) -> np.ndarray:
    """Return the value of a metric over documents: `values` is `[..., n]` or, for pairs, `[..., n, 2]` float64."""
    return AGGREGATES[metric](values) if metric in AGGREGATES else values.mean(-1)


def is_aggregate(metric: str, values: list[Any], value: float) -> bool:
    """Return whether a value is that of a metric over documents. A task may mean something else by its name."""
    if not values:
        return False
    try:
        return bool(np.isclose(aggregate(metric, np.array(values, dtype=np.float64)), value, rtol=1e-6))
    except (ValueError, TypeError, IndexError):  # they are not of the metric's form
        return False


def resampled(metric: str, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a metric over documents drawn with replacement, [M, R], from values `[M, n]` or `[M, n, 2]` float64."""
    n = values.shape[1]
    block = max(1, BLOCK // (4 * n))
    sizes = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    return np.concatenate([aggregate(metric, values[:, rng.integers(n, size=(size, n))]) for size in sizes], axis=1)


def bootstrap_stderr(metric: str, values: np.ndarray) -> float | None:
    """Return the standard error of a metric by bootstrap over documents `[n]` or `[n, 2]`, None for one document."""
    if len(values) < 2:
        return None
    return float(np.std(resampled(metric, values[None], np.random.default_rng(SEED)), ddof=1))


def resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the means per group of documents drawn with replacement: float64 [M, R, K].

    All models share the draws, so the difference of two rows of the result is that of a paired bootstrap. A value is
    NaN where fewer than two documents reach the group, where its sums are not finite, and where a draw holds no
    document that reaches it.

    Args:
        sums: float64 [M, D, K], the sum of a model's values over the tokens of a document in a group.
        counts: int64 [D, K], the number of those tokens.
        resamples: R.
        seed: seed of the draws.
    """
    models, documents, groups = sums.shape
    rng = np.random.default_rng(seed)
    means = np.empty((models, resamples, groups))
    block = max(1, BLOCK // documents)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, resamples, block):
            rows = min(block, resamples - start)
            # A document's weight is the number of times that it is drawn.
            weights = rng.multinomial(documents, np.full(documents, 1 / documents), size=rows).astype(np.float64)
            means[:, start : start + rows] = (weights @ sums) / (weights @ counts)
    means[:, :, (counts > 0).sum(0) < 2] = np.nan  # a single document would give a band without width
    return np.where(np.isfinite(sums).all(1)[:, None], means, np.nan)


def interval(draws: np.ndarray) -> np.ndarray:
    """Return the 95% percentile interval of draws [R, K]: [2, K], low and high; NaN where every draw is NaN."""
    result = np.full((2, draws.shape[1]), np.nan)
    some = ~np.isnan(draws).all(0)
    result[:, some] = np.nanquantile(draws[:, some], INTERVAL, axis=0)
    return result
