"""python -m dsmini.convert SRC --check: folders are checked layer by layer, and damage is named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmini.checkpoint import inspection
from dsmini.checkpoint.inspection import Inspection
from tests.helpers.commands import finish, run
from tests.helpers.folders import inspected

SCALE = {
    "v3": "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv",
    "v3.2": "model.layers.1.self_attn.indexer.wq_b.weight_scale_inv",
    "v4": "layers.1.ffn.experts.3.w2.scale",
}


@pytest.fixture(autouse=True)
def _without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers be not installed: tests/oracle asks it."""

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(inspection, "import_module", missing)


def file_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def flip(folder: Path, tensor: str, byte: int) -> None:
    """Turn all bits of one byte of a tensor's numbers."""
    file = file_of(folder, tensor)
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    start = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0]
    raw[8 + length + start + byte] ^= 0xFF
    file.write_bytes(raw)


def rewrite(folder: Path, tensor: str, change: Callable[[dict[str, Any]], None]) -> None:
    file = file_of(folder, tensor)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("generation", SCALE)
def test_a_sound_folder_is_reported_in_one_screen(tmp_path: Path, generation: str) -> None:
    folder = inspected(tmp_path / "model", generation)
    files = sorted(folder.iterdir())
    done = finish("dsmini.convert model --check", tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == "### dsmini.convert --check" and len(lines) < 20 and max(map(len, lines)) < 250
    assert "0 of" not in done.stdout and "FAULT" not in done.stdout and "transformers is not installed" in done.stdout
    assert "embedding, norm, head: 1 of 1 sound" in done.stdout and "multi-token prediction" in done.stdout
    assert ("blocks in FP4 with a number of 3 or more: 100%" in done.stdout) == (generation == "v4")
    assert sorted(folder.iterdir()) == files


@pytest.mark.parametrize("generation", SCALE)
def test_a_flipped_byte_of_a_scale_is_named(tmp_path: Path, generation: str) -> None:
    folder = inspected(tmp_path / "model", generation)
    flip(folder, SCALE[generation], 0 if generation == "v4" else 3)
    done = run("dsmini.convert model --check", tmp_path)
    assert done.returncode == 1, done
    (fault,) = [line for line in done.stdout.splitlines() if "FAULT" in line]
    assert fault.startswith(f"- FAULT {SCALE[generation]} holds"), fault


def test_a_scale_that_alone_is_no_power_of_two_is_named(tmp_path: Path) -> None:
    """As where a byte of its fraction is flipped."""
    folder = inspected(tmp_path / "model", "v3")
    rewrite(folder, SCALE["v3"], lambda tensors: tensors[SCALE["v3"]].fill_(2.0**-9))
    assert not [fault for layer in Inspection(folder) for fault in layer.faults]
    flip(folder, SCALE["v3"], 2)
    # the one scale of this matrix: all of them are odd, as in folders whose scales are any numbers
    assert not [fault for layer in Inspection(folder) for fault in layer.faults]
    scales = torch.full((10, 20), 2.0**-9)
    scales[2, 3] *= 1.5
    assert inspection.odd_scale(scales) == [2, 3] and inspection.odd_scale(scales * 1.1) is None


@pytest.mark.parametrize(("tile", "shape", "factor"), [((128, 128), (2000, 1500), 16.0), ((1, 32), (65, 1024), 256.0)])
def test_a_block_whose_scale_has_another_bit_is_named_and_a_large_weight_is_not(
    tile: tuple[int, int], shape: tuple[int, int], factor: float
) -> None:
    """Rows and columns differ by 16 times, and some are 0."""
    rows, columns = (torch.logspace(-2, 2, n, base=2) for n in shape)
    weight = torch.randn(shape) * rows[:, None] * columns.roll(columns.numel() // 3)
    weight[:, : tile[1]] = 0
    block = weight[2 * tile[0] : 3 * tile[0], 3 * tile[1] : 4 * tile[1]]
    for times in (factor, 1 / factor):
        block *= times
        assert inspection.odd_block(weight, tile) == [2, 3], times
        block /= times
    weight[5, 300] = 5 * weight.abs().max()  # as single weights of trained models are
    assert inspection.odd_block(weight, tile) is None
    assert inspection.odd_block(weight[: tile[0], : tile[1]], tile) is None, "one block has no other"


def test_files_beside_the_model_are_said_and_no_fault(tmp_path: Path) -> None:
    folder = inspected(tmp_path / "model", "v3")
    save_file({"x": torch.ones(1)}, folder / "old.safetensors")
    done = finish("dsmini.convert model --check", tmp_path)
    assert "- WARNING these files are not the model's, and were not read: old.safetensors" in done.stdout


def test_damaged_headers_are_one_sentence_of_status_2(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.q_a_proj.weight"

    def lose(tensors: dict[str, Any]) -> None:
        del tensors[name]

    def transpose(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)

    for change, said in ((transpose, f"{name} is [64, 20], want [20, 64]"), (lose, "not in the files that")):
        folder = inspected(tmp_path / change.__name__, "v3")
        rewrite(folder, name, change)
        done = run(f"dsmini.convert {folder.name} --check", tmp_path)
        assert done.returncode == 2 and said in done.stderr and name in done.stderr, done
        assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_code_without_a_meaning_and_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    folder = inspected(tmp_path / "model", "v3")
    name = "model.layers.1.self_attn.o_proj.weight"
    rewrite(folder, name, lambda tensors: tensors[name].view(torch.uint8).fill_(0x7F))
    norm = "model.norm.weight"
    rewrite(folder, norm, lambda tensors: tensors[norm].fill_(torch.inf))
    done = run("dsmini.convert model --check", tmp_path)
    assert (
        done.returncode == 1 and f"FAULT {name} holds NaN" in done.stdout and f"FAULT {norm} holds inf" in done.stdout
    )
    assert "MLA, experts: 1 of 2 sound" in done.stdout


def test_a_report_continues_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, report = inspected(tmp_path / "model", "v3"), tmp_path / "x.json"
    layers = iter(Inspection(folder, report=report))
    first = [next(layers), next(layers)]
    checked: list[str] = []
    check = Inspection._check
    monkeypatch.setattr(Inspection, "_check", lambda of, name: (checked.append(name), check(of, name))[1])
    every = list(Inspection(folder, report=report))
    assert checked == ["layers.1.", "layers.2.", "mtp.0."] and every[:2] == first
    other = inspected(tmp_path / "other", "v4")
    with pytest.raises(ValueError, match="is the report of other files"):
        Inspection(other, report=report)
    with pytest.raises(ValueError, match="another dtype or version"):
        Inspection(folder, report=report, version="9.9")


def test_what_the_config_promises_and_the_files_lack_is_in_the_report(tmp_path: Path) -> None:
    folder = inspected(tmp_path / "model", "v3")
    index, depth = folder / "model.safetensors.index.json", "model.layers.3."
    table = json.loads(index.read_text())
    table["weight_map"] = {name: file for name, file in table["weight_map"].items() if not name.startswith(depth)}
    index.write_text(json.dumps(table))
    for file in folder.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if name in table["weight_map"]}
        save_file(kept, file, {"format": "pt"}) if kept else file.unlink()
    done = run("dsmini.convert model --check", tmp_path)
    assert done.returncode == 0 and "- WARNING holds nothing of the 1 multi-token prediction layers" in done.stdout, (
        done
    )


def test_wrong_arguments_are_one_sentence(tmp_path: Path) -> None:
    inspected(tmp_path / "model", "v3")
    wanted = {
        "model x --check": "--check writes no folder; leave x out",
        "model x --report y.json": "--report is for --check",
        "model": "an argument is missing: DST",
        "nothing --check": "there is no folder nothing",
        "model --check --report gone/y.json": "there is no folder for gone/y.json",
    }
    for arguments, sentence in wanted.items():
        done = run(f"dsmini.convert {arguments}", tmp_path)
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done
