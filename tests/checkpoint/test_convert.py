"""python -m dsmini.convert: trained runs and published folders become folders, and mistakes are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsmini import Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.training_state import load_run
from dsmini.convert import main
from tests.helpers import folders
from tests.helpers.commands import check_refused
from tests.helpers.inference_layouts import BUILT
from tests.helpers.runs import new_run

Build = Callable[..., Transformer]
Convert = Callable[[str, Path], tuple[str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of a few steps on bytes, with checkpoints after steps 2 and 4."""
    run = tmp_path_factory.mktemp("trained") / "x"
    assert new_run(run, steps=4, eval_every=100).train()
    return run


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


def test_trained_run_becomes_a_folder(trained: Path, tmp_path: Path, convert: Convert) -> None:
    out, err = convert(f"{trained} exported --json", tmp_path)
    figures = json.loads(out)
    assert figures["files"] == ["model.safetensors"]
    assert "will list the tensors of model.layers.2, model.layers.3 as unexpected and load the others" in err
    model, config = load_run(trained)
    loaded = load_pretrained(tmp_path / "exported")
    assert not folders.different(model.state_dict(), loaded.state_dict())
    tokens = torch.randint(0, 61, (2, 30))
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.config.n_mtp_layers == config.model.n_mtp_layers == 2
    assert folders.config_of(tmp_path / "exported")["eos_token_id"] == 0
    assert figures["bytes_written"] == sum(t.nbytes for t in folders.read(tmp_path / "exported").values())


def test_checkpoint_is_written_in_fp8_and_bf16(trained: Path, tmp_path: Path, convert: Convert) -> None:
    source = trained / "checkpoints" / "step-000002"
    out, _ = convert(f"{source} short --fp8 --dtype bfloat16 --shard-size 20KB", tmp_path)
    written = folders.read(tmp_path / "short")
    assert {t.dtype for n, t in written.items() if folders.is_matrix(n)} == {folders.FP8}
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert written["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert len(list((tmp_path / "short").glob("model-*.safetensors"))) > 1
    assert "parameters" in out
    want, _ = load_run(source)
    tokens = torch.randint(0, 61, (1, 30))
    got = load_pretrained(tmp_path / "short", fp8="keep")(tokens)
    assert (got - want(tokens)).norm() < 0.2 * want(tokens).norm()


def test_mistakes_are_refused_and_write_nothing(tmp_path: Path, small_model: Build) -> None:
    save_pretrained(small_model(**BUILT), tmp_path / "a")
    check_refused("dsmini.convert", tmp_path)


def test_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Build) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsmini.checkpoint.tensor_files.os.pwrite", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/b'$"):
        save_pretrained(small_model(), tmp_path / "b")
    assert not list(tmp_path.iterdir())
