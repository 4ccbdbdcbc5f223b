"""python -m dsmini.convert: trained runs, published folders and DeepSeek's inference layout become folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmini import Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.trained_model import load_run
from dsmini.convert import main
from dsmini.text.tokenizer import byte_tokenizer_json
from tests.helpers import commands, folders
from tests.helpers.configs import refusal
from tests.helpers.inference_layouts import INDEX, INFERENCE, inference_layout

Build = Callable[..., Transformer]
Convert = Callable[[str, Path], tuple[str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of a few steps on bytes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("to be or not to be, that is the question " * 200)
    done = commands.run(
        f"dsmini.train --data.path text.txt --train.steps 4 --train.save-every 2 {commands.TINY} --out runs/x --json",
        folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Run the command in a folder, in this process, and return what it says on its two outputs."""

    def run(arguments: str, folder: Path) -> tuple[str, str]:
        monkeypatch.chdir(folder)
        capsys.readouterr()
        assert main(arguments.split()) == 0
        said = capsys.readouterr()
        return said.out, said.err

    return run


def test_trained_run_becomes_a_folder(trained: Path, convert: Convert) -> None:
    out, err = convert("runs/x exported --json", trained)
    figures = json.loads(out)
    assert figures["files"] == ["model.safetensors"]
    assert "read" in err
    assert "MB/s" in err
    assert "transformers will list the tensors of model.layers.2 as unexpected and load the others" in err
    model, config = load_run(trained / "runs" / "x")
    loaded = load_pretrained(trained / "exported")
    assert not folders.different(model.state_dict(), loaded.state_dict())
    tokens = torch.randint(0, 256, (2, 30))
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.config.n_mtp_layers == config.model.n_mtp_layers == 1
    assert folders.config_of(trained / "exported")["eos_token_id"] == 0
    assert figures["bytes_written"] == sum(t.nbytes for t in folders.read(trained / "exported").values())


def test_checkpoint_is_written_in_fp8_and_bf16(trained: Path, convert: Convert) -> None:
    source = trained / "runs" / "x" / "checkpoints" / "step-000002"
    out, _ = convert(f"{source} short --fp8 --dtype bfloat16 --shard-size 20KB", trained)
    written = folders.read(trained / "short")
    assert {t.dtype for n, t in written.items() if folders.is_matrix(n)} == {folders.FP8}
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert written["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert len(list((trained / "short").glob("model-*.safetensors"))) > 1
    assert "parameters" in out
    want, _ = load_run(source)
    tokens = torch.randint(0, 256, (1, 30))
    got = load_pretrained(trained / "short", fp8="keep")(tokens)
    assert (got - want(tokens)).norm() < 0.2 * want(tokens).norm()


def test_byte_tokenizer_round_trip() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers library")
    tokenizer = tokenizers.Tokenizer.from_str(byte_tokenizer_json())
    for text in (
        "",
        "def f(x):\n\treturn 'ü€😀'",
        "\x00\x01 \u0100 Ġ\u00ad\u00a0\r\n  x  ",
        "a" * 5000,
        "".join(map(chr, range(256))),
    ):
        ids = tokenizer.encode(text).ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 256


BUILT = INFERENCE | {
    "n_mtp_layers": 0,
    "max_seq_len": 16384,
    "original_seq_len": 4096,
    "norm_eps": 1e-6,
}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("index", [{}, INDEX], ids=["mla", "dsa"])
def test_inference_layout_becomes_a_folder(
    tmp_path: Path, small_model: Build, convert: Convert, fp8: bool, ranks: int, index: dict[str, Any]
) -> None:
    model = small_model(**BUILT | index | ({"attention": "dsa"} if index else {}))
    tensors, meant = folders.tensors_of(model, torch.bfloat16), None
    if fp8:
        tensors, meant = folders.in_fp8(tensors)
    raw = INFERENCE | index | {"dtype": "fp8" if fp8 else "bf16"}
    name = "config.json" if fp8 else "config_16B.json"
    source = inference_layout(tmp_path / "a", tensors, raw, ranks, name)
    loaded = load_pretrained(source, dtype=torch.float32)
    assert loaded.config == model.config
    want = meant or tensors
    for theirs, tensor in folders.tensors_of(loaded).items():
        assert torch.equal(tensor, want[theirs].float()), theirs
    convert("a b --json", tmp_path)
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert (tmp_path / "b" / "tokenizer.json").exists()
    assert load_pretrained(tmp_path / "b").config == model.config
    assert ("quantization_config" in folders.config_of(tmp_path / "b")) == fp8
    tokens = torch.randint(0, 64, (1, 20))
    assert torch.equal(load_pretrained(tmp_path / "b", dtype=torch.float32)(tokens), loaded(tokens))


def test_incomplete_inference_layout_is_refused(tmp_path: Path, small_model: Build) -> None:
    tensors = folders.tensors_of(small_model(**BUILT))
    source = inference_layout(tmp_path / "a", tensors, INFERENCE, 2, "config.json")
    file = source / "model1-mp2.safetensors"
    part = {name: t for name, t in load_file(file).items() if name not in ("embed.weight", "norm.weight")}
    save_file(part, file)
    assert refusal(load_pretrained, source) == (
        f"{source} lacks embed.weight in model1-mp2.safetensors, norm.weight in model1-mp2.safetensors; "
        "convert the model again"
    )
    save_file({name: t for name, t in part.items() if not name.startswith("layers.1.ffn.experts.3")}, file)
    file.rename(source / "model2-mp2.safetensors")
    assert refusal(load_pretrained, source) == f"{source} lacks model1-mp2.safetensors; fetch what is missing"
    (source / "config.json").unlink()
    assert refusal(load_pretrained, source).endswith("inference code there, such as config_671B.json")


def test_published_folder_keeps_its_dtypes(tmp_path: Path, small_model: Build, convert: Convert) -> None:
    model = small_model()
    tensors, _ = folders.in_fp8(folders.tensors_of(model, torch.bfloat16))
    raw = folders.config_json(model.config, quantization_config=folders.QUANTIZED, torch_dtype="bfloat16")
    source = folders.write(tmp_path / "a", tensors, raw, shards=2)
    for arguments, want in (("a b", tensors), ("a c --fp8", tensors)):
        convert(arguments, tmp_path)
        assert not folders.different(want, folders.read(tmp_path / arguments.split()[1]))
    convert("a d --dtype float32", tmp_path)
    exact = load_pretrained(source, dtype=torch.float32)
    assert not folders.different(folders.tensors_of(exact), folders.read(tmp_path / "d"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, small_model: Build, convert: Convert, value: float
) -> None:
    tensors = folders.tensors_of(small_model(), torch.bfloat16)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    raw = folders.config_json(small_model().config)
    folders.write(tmp_path / "a", tensors, raw)
    assert "NaN" not in convert("a b", tmp_path)[0]
    tensors[name][0, -1] = value
    folders.write(tmp_path / "a", tensors, raw)
    assert f"c has infinities or NaN in {name}, as the model has; check it" in convert("a c", tmp_path)[0]
    codes, _ = folders.in_fp8(folders.tensors_of(small_model(), torch.bfloat16))
    codes[name].view(torch.uint8)[0, 0] = 0xFF  # E4M3's NaN
    folders.write(tmp_path / "d", codes, raw | {"quantization_config": folders.QUANTIZED})
    for flags in ("e", "f --dtype float32"):
        assert f"{flags[0]} has infinities or NaN in {name}" in convert(f"d {flags}", tmp_path)[0]


def test_mistakes_exit_2_with_a_sentence(tmp_path: Path, small_model: Build) -> None:
    save_pretrained(small_model(), tmp_path / "a")
    cases = {
        "a a": "a holds files already; choose a new folder, or remove that one",
        "nowhere b": "there is no folder nowhere; name one that holds config.json and safetensors files",
        "a b --shard-size huge": "shard size 'huge' is not the size of a file; use for example 5GB or 500MB",
        "a b --average": "--average is for a training run, and a is not one; leave it out",
        "a a/config.json/b": "cannot make the folder a/config.json/b",
        ". b": "has no config.json; name a folder that holds a model",
    }
    answers = commands.run_all([("dsmini.convert", arguments) for arguments in cases], tmp_path)
    for (status, said), (arguments, sentence) in zip(answers, cases.items(), strict=True):
        assert (status, sentence in said) == (2, True), (arguments, said)
        assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_help_shows_flags(tmp_path: Path) -> None:
    (status, said), (other, unknown) = commands.run_all(
        [("dsmini.convert", "--help"), ("dsmini.convert", "a b --fp9")], tmp_path
    )
    assert status == 0
    assert "usage: python -m dsmini.convert SRC DST [FLAGS]" in said
    assert "--shard-size 5GB" in said
    assert (other, "--fp9" in unknown) == (2, True)
