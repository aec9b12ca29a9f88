"""Measure generation: transformers' own loop beside CUDA graphs, in one run, and check that the tokens are equal.

    python tests/benchmarks/generation_speed.py [MODEL_JSON] [--new 256] [--batches 1,64,256] [--prompts 128,1024]

The model has random weights, in bfloat16 on a GPU. A time per token is that of the whole call less that of the prompt,
divided by the tokens after the first; it is the least of three calls after one that compiles and records.
"""

import argparse
import time
from pathlib import Path

import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.eval.generation.batch_size import free_memory, largest_batch
from lrnn.eval.generation.decoding import GraphDecoding


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(model, ids, new: int, calls: int, **options) -> tuple[float, float, torch.Tensor]:
    """Return the seconds of the prompt with one token, the seconds per further token, and all tokens."""
    options |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    times: dict[int, list[float]] = {1: [], new: []}
    for _ in range(1 + calls):
        for count, seconds in times.items():
            start = clock(ids.device)
            out = model.generate(ids, max_new_tokens=count, **options)
            seconds.append(clock(ids.device) - start)
    prompt, whole = min(times[1][1:]), min(times[new][1:])
    return prompt, (whole - prompt) / (new - 1), out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path, default=Path("configs/models/1.3b.json"))
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--prompts", default="128,1024")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LrnnConfig.from_json_file(args.model)
    with torch.device(device):
        model = LrnnForCausalLM(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {model.num_parameters() / 1e6:.0f}M parameters in {model.dtype}")
    if device.type == "cuda":
        longest = max(map(int, args.prompts.split(","))) + args.new
        print(f"largest batch by memory: {largest_batch(model, free_memory(device), longest)}")
    print("batch  prompt  loop    prompt s  ms/token  tokens/s  peak GB  equal tokens")
    for batch in map(int, args.batches.split(",")):
        for length in map(int, args.prompts.split(",")):
            ids = torch.randint(6, config.vocab_size, (batch, length), device=device)
            reference = None
            for loop, options in (("eager", {}), ("graph", {"custom_generate": GraphDecoding(model)})):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                new = min(args.new, 32) if loop == "eager" else args.new
                prompt, step, out = measure(model, ids, new, calls=1 if loop == "eager" else 3, **options)
                peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
                if reference is None:
                    reference = out
                same = (out[:, : reference.shape[1]] == reference).float().mean().item()
                print(
                    f"{batch:5d}  {length:6d}  {loop}  {prompt:9.3f}  {1e3 * step:8.2f}  {batch / step:8,.0f}  "
                    f"{peak:7.1f}  {same:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
