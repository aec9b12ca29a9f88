"""Measurements of a run, and their display.

log             `MetricsLog`: records as JSON lines, TensorBoard, wandb, and the lines that a person reads
wandb_run       the identity and the configuration of a run at Weights & Biases
speed           `Speed`: tokens per second, MFU, memory, and the part of a step that is not computation
eigenvalues     `EigenvalueProbe`: the distribution of the state transitions' eigenvalues by layer
flops           FLOPs per token of a model, and the peak of a GPU
plot            `lrnn plot`: the records of one or several runs as a picture

Records flow one way: the loop measures, `MetricsLog` writes `metrics.jsonl`, and `lrnn.records.read_metrics` reads it.
"""
