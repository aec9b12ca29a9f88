"""Models that know the right answers, or none: a gold oracle scores 1 on every task, the others its floor."""

import random

from lm_eval.api.model import LM


class Gold(LM):
    """Give the right answer of every document.

    Args:
        tasks: lm-eval's task objects by name.
    """

    def __init__(self, tasks):
        super().__init__()
        self.tasks = tasks

    def choice(self, request):
        task = self.tasks[request.task_name]
        target = task.doc_to_target(request.doc)
        return task.doc_to_text(request.doc) if isinstance(target, str) else target  # WinoGrande's choices are contexts

    def text(self, request):
        target = self.tasks[request.task_name].doc_to_target(request.doc)
        return target[0] if isinstance(target, list) else target

    def loglikelihood(self, requests):
        """Return (0, True) for the right continuation, and (-1, False) for every other."""
        found = []
        for request in requests:
            chosen = self.tasks[request.task_name].OUTPUT_TYPE == "loglikelihood" or request.idx == self.choice(request)
            found.append((0.0, True) if chosen else (-1.0, False))
        return found

    def generate_until(self, requests):
        return [f" {self.text(request)}" for request in requests]

    def loglikelihood_rolling(self, requests):
        return [0.0 for _ in requests]


class First(Gold):
    """Choose the first of the choices, and generate one text for all prompts."""

    def choice(self, request):
        return 0

    def text(self, request):
        return "the"

    def loglikelihood(self, requests):
        choices = [self.tasks[request.task_name].OUTPUT_TYPE == "multiple_choice" for request in requests]
        return [
            found if choice else (-1.0, False)
            for found, choice in zip(super().loglikelihood(requests), choices, strict=True)
        ]

    def loglikelihood_rolling(self, requests):
        return [-2.0 for _ in requests]


class Random(First):
    """Give every continuation a random log-likelihood."""

    def loglikelihood(self, requests):
        rng = random.Random(0)
        return [(-1 - rng.random(), False) for _ in requests]
