"""The measures of a trained model by name: what a `Figure` is called, in which unit, and which direction is better."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["low", "high"]
MIX = "mix"  # the domain that is the weighted mean of others
ALL = "all"  # the mean over all kinds of documents of a measure


@dataclass(frozen=True)
class Measure:
    """A measure.

    Attributes:
        title: for people.
        unit: of the values; empty for a fraction or a plain number.
        better: which values are better; None if neither.
        aggregate: how the values of documents become one value: the name of a metric of `lrnn.eval.statistics`.
        of: what the measure is of, one word.
        at: what `Figure.at` counts; empty if there is none.
    """

    title: str
    unit: str
    better: Better | None
    aggregate: str = "mean"
    of: str = ""
    at: str = ""


BYTES, NATS = "bits_per_byte", "nats_per_token"  # of pairs (log-likelihood in nats, bytes or tokens)
MEASURES = {
    "heldout_bits_per_byte": Measure("held-out text", "bits per byte", "low", BYTES, of="domain"),
    "heldout_nats_per_token": Measure("held-out loss", "nats per token", "low", NATS, of="domain"),
    "answer_nats_per_token": Measure("loss on the answers of traces", "nats per token", "low", NATS, of="domain"),
    "rest_nats_per_token": Measure("loss on the rest of traces", "nats per token", "low", NATS, of="domain"),
    "gold_bits_per_byte": Measure("right answers of benchmarks", "bits per byte", "low", BYTES, of="benchmark"),
    "traces_accuracy": Measure("program traces", "accuracy", "high", of="format", at="state changes"),
    "recall_accuracy": Measure("multi-query recall", "accuracy", "high", of="task", at="pairs"),
    "recall_bits_per_byte": Measure(
        "right answers of multi-query recall", "bits per byte", "low", BYTES, of="task", at="pairs"
    ),
    "needle_accuracy": Measure("needles in a haystack", "accuracy", "high", of="form", at="tokens"),
    "needle_bits_per_byte": Measure(
        "right answers about needles", "bits per byte", "low", BYTES, of="form", at="tokens"
    ),
    "position_nats": Measure("loss by position", "nats per token", "low", NATS, of="domain", at="last position"),
    "negative_eigenvalues": Measure("eigenvalues below 0", "fraction", None, of="layer", at="step"),
    "smallest_eigenvalue": Measure("first percentile of eigenvalues", "eigenvalue", None, of="layer", at="step"),
    "median_eigenvalue": Measure("median of eigenvalues", "eigenvalue", None, of="layer", at="step"),
}
# What is known of a training, by name. The time of measuring is taken by who measures, the others by `training_facts`.
FACTS = {
    "seconds": Measure("time of training", "s", "low"),
    "gpu_seconds": Measure("time of training times its share of GPUs", "GPU-s", "low"),
    "measuring_gpu_seconds": Measure("time of measuring times its share of a GPU", "GPU-s", "low"),
    "tokens_per_second": Measure("median speed of the run", "tokens/s", "high"),
    "peak_gb": Measure("peak memory of a process", "GB", "low"),
    "loss": Measure("training loss at the end", "nats per token", "low"),
    "spikes": Measure("loss spikes", "", "low"),
    "skipped_steps": Measure("skipped steps", "", "low"),
}
