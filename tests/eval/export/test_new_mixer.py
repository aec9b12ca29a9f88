"""Test that a mixer is one file: a copy of the repository with one more file trains, documents and exports it."""

import json
import os
import shutil
import sys
from pathlib import Path

import clean_process
import pytest

from lrnn.model.layers import Mixer
from lrnn.model.mixers import MIXERS
from lrnn.model.registry import Cost, register

REPOSITORY = Path(__file__).parents[3]
TOY = '''"""A leaky average as a token mixer."""

import torch
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers import Mixer
from .ops import diagonal_recurrence
from .registry import Cost, Ranges, register


@register("toy")
class Toy(Mixer):
    """S_t = a S_{t-1} + v_t, one number per channel; a is a parameter."""

    title, paper = "Leaky average", "2601.00001"
    ranges = Ranges(negative="decay tanh(w)", positive="decay sigmoid(w)")
    begins_with_zeros = True

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        inner = config.num_heads * config.head_dim
        return Cost(2 * config.hidden_size * inner, recurrence=3 * inner, state=inner)

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        inner = config.num_heads * config.head_dim
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.w = nn.Parameter(torch.empty(inner))

    def reset_parameters(self):
        self.set_fresh("w", 1.0)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        v = self.v_proj(x)[:, :, :, None]
        a = torch.tanh(self.w) if self.allow_neg_eigval else torch.sigmoid(self.w)
        g, sign = a.abs().log()[None, None, :, None].expand_as(v), a.sign()[None, None, :, None].expand_as(v)
        ones = torch.ones_like(v)
        o, state = diagonal_recurrence(
            ones, ones, v, g, sign, initial_state=self.read_state(cache), output_final_state=cache is not None,
            document=document,
        )
        self.write_state(cache, state)
        return self.o_proj(o[..., 0].to(x.dtype))
'''
USE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import lrnn
from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.eval.export.read import Trained
from lrnn.eval.export.write import export
from lrnn.pretrain.metrics.flops import train_flops_per_token
from lrnn.tokenizer import load_tokenizer
from lrnn.track.grid import load_grid

root, out, tokenizer = map(Path, sys.argv[1:])
assert Path(lrnn.__file__).is_relative_to(root), lrnn.__file__
size = dict(hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=16, intermediate_size=48)
config = LrnnConfig(mixer="toy", vocab_size=640, max_position_embeddings=64, **size)
torch.manual_seed(0)
model = LrnnForCausalLM(config)
ids = torch.randint(640, (2, 20))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
losses = []
for _ in range(2):
    optimizer.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    losses.append(loss.item())
    optimizer.step()
sys.path.insert(0, str(root / "docs"))
import make_configuration
(out / "grid.yaml").write_text((root / "configs/track/parity_small.yaml").read_text())
_, cells = load_grid(out / "grid.yaml", ["models={toy: {mixer: toy, %s}}" % ", ".join(
    f"{name}: {value}" for name, value in size.items())])
trained = Trained(model, load_tokenizer(tokenizer), {"step": 2, "tokens": 40})
print("RESULT", json.dumps({
    "losses": losses,
    "without gradient": [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()],
    "flops": train_flops_per_token(config),
    "documentation": make_configuration.page(),
    "ranges": sorted({cell.range for cell in cells}),
    "difference": export(trained, out / "exported"),
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory, sentencepiece_model):
    """Return the results of a process that has the toy mixer, and the folder that it exports."""
    root, out = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("out")
    for room in ("lrnn", "configs", "docs"):  # the links in lrnn/ become folders
        shutil.copytree(REPOSITORY / room, root / room, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (root / "lrnn/model/mixer_toy.py").write_text(TOY)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules")}
    command = [sys.executable, "-I", "-c", USE, str(root), str(out), str(sentencepiece_model)]
    done = clean_process.run(command, cwd=out, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {**json.loads(line.removeprefix("RESULT ")), "folder": out / "exported"}


def test_it_trains(found):
    assert found["losses"][1] < found["losses"][0] and not found["without gradient"]


def test_its_cost_counts(found):
    layer = 2 * 32 * 32 + 3 * 32 * 48 + 3 * 32
    assert found["flops"] == 6 * (2 * layer + 640 * 32)


def test_it_is_documented(found):
    row = "| `toy` | Leaky average | linear RNN | arXiv:2601.00001 | decay tanh(w) | decay sigmoid(w) |"
    assert row in found["documentation"].splitlines()


def test_lrnn_track_knows_its_ranges(found):
    assert found["ranges"] == ["negative", "positive"]


def test_it_is_exported_and_loads_without_lrnn(found):
    """The exporter has loaded the folder with lrnn and without it, and compared the logits."""
    assert found["difference"] < 1e-4
    card = (found["folder"] / "README.md").read_text()
    assert "| token mixer | Leaky average (arXiv:2601.00001) |" in card and "[-1, 1]: decay tanh(w)" in card
    assert "| recurrent state | 64 numbers per sequence |" in card and "short convolution" not in card
    assert (found["folder"] / "mixer_toy.py").read_text() == TOY
    assert "from .mixer_toy import Toy\n" in (found["folder"] / "mixers.py").read_text()


def test_a_mixer_that_declares_too_little_is_refused():
    with pytest.raises(TypeError, match=r"'half', class .*Half, does not declare paper, cost"):

        @register("half")
        class Half(Mixer):
            title = "Half a mixer"

    assert "half" not in MIXERS


def test_a_name_is_unique():
    with pytest.raises(ValueError, match=r"mixer 'gla' is already GatedLinearAttention of lrnn\.model\.mixer_gla"):

        @register("gla")
        class Other(Mixer):
            title, paper = "Other", "2601.00001"
            cost = staticmethod(lambda config: Cost(0, 0, 0))

    assert MIXERS["gla"].__name__ == "GatedLinearAttention"
