"""Compile a saved model with Inductor as a user does: `python -P compile_model.py FOLDER [lrnn]`.

With `lrnn` the model is lrnn's, otherwise the folder's own. Prints the largest relative differences between the eager
and the compiled model, and how many graphs they took, as one JSON object.
"""

import json
import sys

import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM


def main(folder: str, *packages: str) -> None:
    torch.set_num_threads(1)
    if packages:
        import lrnn  # noqa: F401
    else:
        sys.modules["lrnn"] = None  # type: ignore[assignment]  # makes `import lrnn` fail
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.randint(3, 600, (2, 100), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    results = []
    for call in (model, compiled):
        model.zero_grad()
        out = call(input_ids=ids, labels=ids)
        out.loss.backward()
        found = {"loss": out.loss.detach(), "logits": out.logits.detach()}
        found |= {f"d{name}": p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            found["masked"] = call(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        results.append(found)
    eager, other = results
    errors = {name: ((other[name] - x).norm() / x.norm()).item() for name, x in eager.items()}
    print(
        "RESULT",
        json.dumps({"class": type(model).__module__, "errors": errors, "graphs": counters["stats"]["unique_graphs"]}),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
