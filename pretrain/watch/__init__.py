"""Watching a run between its steps: scores of lm-eval and generated samples, which training does not notice.

`settings` holds the sections `eval` and `samples` of the YAML file. `watch` decides what is due after a step, asks an
`Evaluator` for it, and records what it found; `undisturbed` puts back what an evaluation changes in the process. The
evaluator itself belongs to a higher room: `lrnn pretrain` hands it to the loop (see `protocol`).
"""
