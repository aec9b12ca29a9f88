"""Register `lrnn` with lm-eval, and run lm-eval's own command line with it.

`lm_eval` looks for no plug-ins, so its command line is started from here:

    python -m lrnn.eval.lm_eval run --model lrnn --model_args pretrained=DIR,bos=auto --tasks hellaswag

In a program, `import lrnn.eval.lm_eval` makes `lm_eval.simple_evaluate(model="lrnn", ...)` work.
"""

import sys

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from lrnn.errors import UserError
from lrnn.eval.suites.build import compile_templates_once

model_registry.register("lrnn", target="lrnn.eval.suites.model:Model")


def main() -> int:
    """Run `lm_eval`. Return 2 for a folder that cannot be evaluated."""
    compile_templates_once()
    try:
        cli_evaluate()
    except UserError as error:
        print(f"lrnn: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
