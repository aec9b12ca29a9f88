"""Evaluate a model while it trains, on all processes of the run, as `lrnn eval` evaluates an export of the same step.

`evaluator` is what `lrnn pretrain` hands to the loop. At the start of a run it checks tasks, data and prompts (`tasks`,
`prompts`). Between steps it copies the weights into a plain model (`weights`), because the model that trains has layers
and hooks of its own. Then the main process asks, and all ranks answer (`crew`): chunks of lm-eval's requests, which
are those of `lrnn eval`, and prompts to continue. So neither scores nor samples depend on the number of processes.
"""
