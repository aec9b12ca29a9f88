"""Test the checks of an export, its output, and the errors that must stop it."""

import shutil
import sysconfig
from pathlib import Path

import pytest
from export_checkpoints import OTHER_MIXERS, random_model, write_checkpoint, write_manifest
from safetensors.torch import load_file, save_file

from lrnn import LrnnConfig, cli
from lrnn.errors import UserError
from lrnn.eval.export import write
from lrnn.eval.export.read import read_checkpoint
from lrnn.eval.export.write import export
from lrnn.formats.fla import to_fla_config
from lrnn.tokenizer import train_sentencepiece

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture
def checkpoint(tmp_path, sentencepiece_model):
    return write_checkpoint(tmp_path / "run", random_model("gated"), sentencepiece_model)


def test_output_in_a_log_file(checkpoint, tmp_path, capsys):
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.err == "", "a progress bar is for terminals"
    assert said.out.splitlines()[-1].startswith(f"{tmp_path / 'out'}: logits in float32 differ from the trained")


def refused(capsys, tmp_path, *arguments) -> str:
    """Return the only error line of an export that must fail, and check that it leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    assert cli.main(["export", *map(str, arguments)]) == 2
    assert sorted(tmp_path.iterdir()) == before
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("lrnn: error: ")]
    assert len(lines) == 1, err
    return lines[0]


class TestRefused:
    def test_truncated_state(self, checkpoint, tmp_path, capsys):
        state = checkpoint / "state-00001-of-00002.safetensors"
        state.write_bytes(state.read_bytes()[:-100])
        assert str(state) in refused(capsys, tmp_path, checkpoint, tmp_path / "out")

    def test_altered_state(self, checkpoint, tmp_path, capsys):
        state = checkpoint / "state-00000-of-00002.safetensors"
        content = bytearray(state.read_bytes())
        content[-1] ^= 1
        state.write_bytes(content)
        assert "SHA-256" in refused(capsys, tmp_path, checkpoint, tmp_path / "out")

    def test_no_manifest(self, checkpoint, tmp_path, capsys):
        (checkpoint / "manifest.json").unlink()
        assert "is not a complete checkpoint" in refused(capsys, tmp_path, checkpoint, tmp_path / "out")

    @pytest.mark.parametrize("lost", ["whole", "part"])
    def test_missing_fragment(self, checkpoint, tmp_path, capsys, lost):
        """A manifest that fits the files does not help if the files lack a parameter."""
        name = "model.layers.1.attn.o_proj.weight"
        for file in sorted(checkpoint.glob("state-*"))[0 if lost == "whole" else 1 :]:
            save_file({k: v for k, v in load_file(file).items() if f"param:{name}:" not in k}, file)
        write_manifest(checkpoint)
        assert name in refused(capsys, tmp_path, checkpoint, tmp_path / "out")

    @pytest.mark.parametrize("variant", sorted(OTHER_MIXERS.keys() - {"gated_deltaproduct", "deltaproduct"}))
    def test_fla_does_not_have_the_mixer(self, variant, tmp_path, capsys, sentencepiece_model):
        checkpoint = write_checkpoint(tmp_path / "run", random_model(variant), sentencepiece_model)
        error = refused(capsys, tmp_path, checkpoint, tmp_path / "out", "--format", "fla")
        assert f"this model's is {variant}: use --format hf" in error

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("norm_position", "post", "'post', where fla has 'pre'"),
            ("gated_norm_eps", 1e-5, "1e-05, where fla has 1e-06"),
            ("num_value_heads", 32, "32, where fla has num_heads, 16"),
        ],
    )
    def test_fla_does_not_have_the_form_of_the_blocks(self, field, value, said):
        with pytest.raises(
            UserError, match=f"the fla format cannot express this model's {field} {said}: use --format hf"
        ):
            to_fla_config(LrnnConfig(mixer="deltanet", **{field: value}))
        assert "num_v_heads" not in to_fla_config(LrnnConfig(mixer="deltanet", num_value_heads=16))
        assert to_fla_config(LrnnConfig(gated_norm_eps=1e-6))["norm_eps"] == 1e-6

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"rope_theta": None}, "rope_theta 'null' of layer 1, where fla has rotary positions"),
            ({"qk_norm": "head"}, "qk_norm 'head' of layer 1, where fla has none"),
            ({"attention_gate": True}, "attention_gate True of layer 1, where fla has none"),
            ({"num_heads": 2}, "head_dim 16 of layer 1, where fla has hidden_size / num_heads, 32"),
            ({"norm_position": "post"}, "norm_position 'post' of layer 1, where fla has 'pre'"),
        ],
    )
    def test_fla_does_not_have_the_form_of_attention(self, options, said):
        attention = {"mixer": "attention", "num_heads": 4, "head_dim": 16} | options
        config = LrnnConfig(hidden_size=64, mixer=["gated_deltanet", attention])
        with pytest.raises(UserError, match=f"^the fla format cannot express this model's {said}: use --format hf$"):
            to_fla_config(config)

    def test_fla_has_one_recurrent_mixer(self):
        for pattern, named in (
            (["gated_deltanet", "deltanet"], "gated_deltanet, deltanet"),
            (["deltanet", {"mixer": "deltanet", "num_heads": 3}], "deltanet, deltanet"),
        ):
            with pytest.raises(
                UserError, match=f"one recurrent mixer, the same in all layers; this model's are {named}"
            ):
                to_fla_config(LrnnConfig(mixer=pattern))

    def test_neither_run_nor_checkpoint(self, tmp_path, capsys):
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "manifest.json").write_text("{}")
        assert "neither a run folder" in refused(capsys, tmp_path, tmp_path / "corpus", tmp_path / "out")
        assert "neither a run folder" in refused(capsys, tmp_path, tmp_path / "nowhere", tmp_path / "out")

    def test_run_without_a_checkpoint(self, tmp_path, capsys):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        assert "no complete checkpoint yet" in refused(capsys, tmp_path, tmp_path / "run", tmp_path / "out")

    def test_out_is_not_empty(self, checkpoint, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("dear to somebody")
        assert str(tmp_path / "out") in refused(capsys, tmp_path, checkpoint, tmp_path / "out")
        assert (tmp_path / "out" / "thesis.tex").read_text() == "dear to somebody"

    def test_no_tokenizer(self, checkpoint, tmp_path, capsys):
        shutil.rmtree(checkpoint / "tokenizer")
        write_manifest(checkpoint)
        assert "it has no folder tokenizer" in refused(capsys, tmp_path, checkpoint, tmp_path / "out")

    def test_tokenizer_given_twice_or_too_large(self, checkpoint, tmp_path, capsys, sentencepiece_model):
        arguments = [checkpoint, tmp_path / "out", "--tokenizer", sentencepiece_model]
        assert "leave it out" in refused(capsys, tmp_path, *arguments)
        large = tmp_path / "large.model"
        train_sentencepiece([(STDLIB / "argparse.py").read_text()], 700, large)
        too_large = write_checkpoint(tmp_path / "too_large", random_model("gated"), large)
        assert "700 exceeds" in refused(capsys, tmp_path, too_large, tmp_path / "out")


def test_the_newest_intact_checkpoint_of_a_run(tmp_path, sentencepiece_model, capsys):
    model = random_model("gated")
    write_checkpoint(tmp_path / "run", model, sentencepiece_model, step=10)
    write_checkpoint(tmp_path / "run", model, sentencepiece_model, step=20)
    broken = write_checkpoint(tmp_path / "run", model, sentencepiece_model, step=30) / "run.yaml"
    broken.write_text("")
    assert read_checkpoint(tmp_path / "run").training["step"] == 20
    assert str(broken) in capsys.readouterr().out


@pytest.mark.parametrize(
    "harm, message",
    [("drop", "missing"), ("change", "with lrnn, its logits differ"), ("shape", "mismatched|size|shape")],
)
def test_a_wrong_export_is_found_and_removed(harm, message, checkpoint, tmp_path, monkeypatch):
    write_weights = write.write_weights

    def write_and_harm(model, folder, names):
        write_weights(model, folder, names)
        file = folder / "model.safetensors"
        state = load_file(file)
        name = "model.layers.1.attn.b_proj.weight"
        if harm == "drop":
            del state[name]
        elif harm == "change":
            state[name] += 0.01
        else:
            state[name] = state[name][:1].clone()
        save_file(state, file, metadata={"format": "pt"})

    monkeypatch.setattr(write, "write_weights", write_and_harm)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=message):
        export(read_checkpoint(checkpoint), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_code_that_computes_something_else_is_found(checkpoint, tmp_path, monkeypatch):
    write_texts = write._write_texts

    def write_and_harm(trained, folder, *rest):
        write_texts(trained, folder, *rest)
        code = (folder / "mixer_deltanet.py").read_text()
        assert code.count("2.0 if config.allow_neg_eigval") == 1
        (folder / "mixer_deltanet.py").write_text(code.replace("2.0 if", "1.9 if"))

    monkeypatch.setattr(write, "_write_texts", write_and_harm)
    with pytest.raises(RuntimeError, match="without lrnn, its logits differ"):
        export(read_checkpoint(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_that_needs_lrnn_is_found(checkpoint, tmp_path, monkeypatch):
    """Without the kernels' reference, the code runs only if lrnn is installed."""
    write_code = write.write_code

    def write_and_harm(folder):
        write_code(folder)
        (folder / "delta_rule.py").write_text("from lrnn.kernels.reference.delta_rule import *\n")

    monkeypatch.setattr(write, "write_code", write_and_harm)
    with pytest.raises(RuntimeError, match="does not load without lrnn"):
        export(read_checkpoint(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()
