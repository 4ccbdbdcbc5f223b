"""Check a folder of published weights layer by layer, in the memory of one layer.

First headers: name, shape and dtype of each tensor against the config. Then each layer by itself: its tensors are read
and dequantized, scales and codes are looked at, and its block runs on random hidden states. Where transformers is
installed and knows the model, its block runs on the same weights and states. The weights of a layer are forgotten
before the next is read, and ours before theirs.

A matrix with as many rows as columns that is transposed, two tensors of one shape that changed places, values of the
config that no shape shows, or numbers that are off by a little can only be seen where an original is: this check has
none.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmini.atomic import write_json
from dsmini.checkpoint.load import FP4, RELEASED, Part, PretrainedTensors
from dsmini.checkpoint.tensor_files import Stored, in_released_names, is_v4
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.machine import refuse_too_large
from dsmini.nn import Context, Indexer
from dsmini.nn.dsa import Choice
from dsmini.nn.layers import FP32Module
from dsmini.numerics import FP4_BLOCK, WEIGHT_TILE
from dsmini.reading import is_there, read_table

TOKENS = 144
"""Length of the random sequence: one entry of HCA, and more keys than an indexer may choose here."""
TOPK = {"dsa": 36, "compressed": 9}
"""Number of keys or entries that an indexer chooses, in the place of index_topk: of these tokens it would take all."""
OUTLIER = 2.0**10
"""Factor between a scale and the median of its matrix from which it is named."""
LONE = 3.0
"""Octaves by which one block's mean size must differ more than any other's of its matrix to be named."""
AGREES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest error of a block compared with transformers', as a share of the norm of what it adds to a token."""


@dataclass(kw_only=True)
class Checked:
    """The findings on a layer, or on what is outside of layers."""

    name: str
    kind: str
    faults: list[str] = field(default_factory=list)
    error: float | None = None
    """Difference from transformers' block, as a share: the median of the tokens. None: it was not asked."""
    scales: list[float] = field(default_factory=list)
    """Smallest and largest scale of quantized matrices; empty where none is."""
    upper_half: float | None = None
    """Share of the blocks in FP4 with a number of 3 or more, of 6 at most: a scale made of the block's largest number
    leaves all of them so."""
    seconds: float = 0.0


class Inspection:
    """The check of a folder; iterate over it for a Checked of each layer.

    Args:
        dtype: of weights and products.
        report: file in which finished layers are stored, and from which a later check takes them; None: none is.
        version: of what checks; a report of another is refused.

    Raises: ValueError for headers that do not fit the config, with all that is wrong, and for the report of another
        folder.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, report: Path | None = None, version: str = ""
    ) -> None:
        self.there: PretrainedTensors = PretrainedTensors(folder)
        self.dtype: torch.dtype = dtype
        self.report: Path | None = report
        files = {file: file.stat() for stored in self.there.reader.tensors.values() for file in stored.files}
        seen = [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in files.items()]
        self.files: int = len(files)
        self.stray: list[str] = sorted(file.name for file in folder.glob("*.safetensors") if file not in files)
        """Files of tensors that are not of the model."""
        made_by = version, [*Checked.__dataclass_fields__]
        self.key: str = hashlib.sha256(repr((sorted(seen), self.there.raw, dtype, made_by)).encode()).hexdigest()
        self.done: dict[str, Any] = {}
        if report is not None and is_there(report):
            stored = read_table(report)
            require(
                stored.get("of") == self.key,
                f"{report} is the report of other files, another dtype or version; remove it, or choose a new name",
            )
            self.done = stored["layers"]
        elif report is not None:
            require(report.absolute().parent.is_dir(), f"there is no folder for {report}; make it, or name another")
        self.peer: Peer | None
        self.why_not: str
        self.peer, self.why_not = peer_of(folder, self.there.config, dtype)

    @property
    def names(self) -> list[str]:
        """Beginnings of the names of each layer's tensors, and "" for what is outside of layers."""
        c = self.there.config
        return ["", *(f"layers.{i}." for i in range(c.n_layers)), *(f"mtp.{k}." for k in range(c.n_mtp_layers))]

    def __iter__(self) -> Iterator[Checked]:
        for name in self.names:
            if name not in self.done:
                start = time.perf_counter()
                checked = self._check(name)
                checked.seconds = time.perf_counter() - start
                self.done[name] = asdict(checked)
                if self.report is not None:
                    write_json(self.report, {"of": self.key, "layers": self.done})
            yield Checked(**self.done[name])

    def _check(self, name: str) -> Checked:
        c, there = self.there.config, self.there
        layer, block = None, None
        if name:
            layer = int(name.split(".")[1]) + c.n_layers * name.startswith("mtp.")
            block = there.model.layers[layer] if layer < c.n_layers else there.model.mtp[layer - c.n_layers].block
        checked = Checked(name=name.rstrip(".") or "embedding, norm, head", kind=kind_of(c, layer))
        inner = name if layer is None or layer < c.n_layers else f"{name}block."
        outside = re.compile(r"(layers|mtp)\.").match
        parts = {ours: of for ours, of in there.parts.items() if (ours.startswith(name) if name else not outside(ours))}
        weights: dict[str, Tensor] = {}
        for ours, of in parts.items():
            tensor = self._read(ours, of, checked)
            if tensor is not None and block is not None and ours.startswith(inner):
                weights[ours.removeprefix(inner)] = tensor
        if block is None or checked.faults:
            return checked
        # the same states for both blocks: [1, s, m], or several streams of them
        states, tokens = self.states(), torch.arange(TOKENS)[None] % c.vocab_size
        block.load_state_dict(weights, assign=True)
        weights.clear()
        for indexer in (part for part in block.modules() if isinstance(part, Indexer)):
            indexer.topk = TOPK[c.attention]
        context, chosen = Context(positions=torch.arange(TOKENS)[None], tokens=tokens), random_choice()
        if layer is not None and (source := c.index_source(layer)) != layer:
            context.choices[source] = Choice(chosen)
        with torch.no_grad():
            out = block(states, context)[0]
        block.to("meta")
        if not bool(out.isfinite().all()):
            checked.faults.append(f"{checked.name}: the block's output has infinities or NaN")
        elif self.peer is not None and layer is not None and layer < c.n_layers:
            theirs = self.peer.run(layer, states, tokens, chosen, there, parts)
            # the median: by rounding, tokens near a tie choose another expert or key
            pairs = ((out, theirs), (theirs, states))
            difference, added = ((x.float() - y.float()).flatten(2).norm(dim=-1) for x, y in pairs)
            checked.error = float((difference / added).median())
            if not checked.error < AGREES[self.dtype]:
                checked.faults.append(f"{checked.name}: transformers' block differs by {checked.error:.2g}")
        there.reader.release()
        return checked

    def states(self) -> Tensor:
        """Return random hidden states."""
        c, generator = self.there.config, torch.Generator().manual_seed(0)
        shape = (1, TOKENS, c.hc_mult, c.dim) if c.hc_mult > 1 else (1, TOKENS, c.dim)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def _read(self, ours: str, parts: list[Part], checked: Checked) -> Tensor | None:
        """Return a tensor of the model; None if a part has no meaning, which is noted."""
        whole = self.there.model.state_dict()[ours]
        owner = self.there.model.get_submodule(ours.rpartition(".")[0])
        dtype = whole.dtype
        if whole.is_floating_point():
            dtype = torch.float32 if isinstance(owner, FP32Module) else self.dtype
        refuse_too_large(whole.numel() * dtype.itemsize, f"{ours} of {self.there.folder}", torch.device("cpu"))
        tensor, since = torch.empty(whole.shape, dtype=dtype), 0
        for part in parts:
            try:
                held = self.there.held(part)
                self._look_at(part, held, checked)
                numbers = self.there.decoded(held, dtype)
                tile = (1, FP4_BLOCK) if self.there.stored(part.name) == FP4 else WEIGHT_TILE
                if part.scales is not None and (place := odd_block(numbers, tile)) is not None:
                    words = f"a scale at {place} that makes its numbers unlike others of their rows and columns"
                    raise ValueError(f"{part.scales.name} holds {words}; fetch the file again")
                (tensor if part.expert is None else tensor[part.expert]).copy_(numbers)
            except ValueError as error:
                checked.faults.append(str(error).removeprefix(f"{self.there.folder}: "))
                return None
            since += self.there.reader.tensors[part.name].nbytes
            if since > RELEASED:
                self.there.reader.release()
                since = 0
        return tensor

    def _look_at(self, part: Part, held: list[Tensor], checked: Checked) -> None:
        """Note the range of a matrix' scales and of its codes in FP4. Raises: ValueError for a scale out of line."""
        if part.scales is None:
            return
        codes, scales = held[0], held[1].float()
        least, most, median = float(scales.min()), float(scales.max()), float(scales.median())
        every = [*checked.scales, least, most]
        checked.scales = [min(every), max(every)]
        if (place := odd_scale(scales)) is not None:
            words = f"{float(scales[tuple(place)]):.3g} at {place}, next to a median of {median:.3g}"
            raise ValueError(f"{part.scales.name} holds {words}; fetch the file again")
        if self.there.stored(part.name) == FP4:
            codes = codes.view(torch.uint8)
            sizes = torch.stack((codes & 7, codes >> 4 & 7), -1).flatten(-2).unflatten(-1, (scales.shape[-1], -1))
            share = float((sizes.amax(-1) >= 5).float().mean())
            checked.upper_half = share if checked.upper_half is None else min(share, checked.upper_half)


def random_choice() -> Tensor:
    """Return keys [1, s, k] that each query sees, for a block that takes another one's choice; -1 is none."""
    best = torch.rand(1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)).tril().topk(TOPK["dsa"], -1)
    return best.indices.masked_fill(best.values == 0, -1)


def odd_scale(scales: Tensor) -> list[int] | None:
    """Return the place of a scale that is far from the median, or not a power of two where nearly all others are."""
    median = scales.median()
    odd = (scales > OUTLIER * median) | (scales * OUTLIER < median)
    is_power = torch.frexp(scales)[0] == 0.5
    if float(is_power.float().mean()) > 0.99:
        odd = odd | ~is_power
    return odd.nonzero()[0].tolist() if bool(odd.any()) else None


def odd_block(numbers: Tensor, tile: tuple[int, int]) -> list[int] | None:
    """Return the place of the one block whose numbers are far from what its row and column of blocks predict.

    Numbers, not scales: a single large one makes its block's scale large, and the mean of their roots hardly.
    """
    size = F.avg_pool2d(numbers.float().abs().sqrt_()[None], tile, ceil_mode=True)[0]
    off = (2 * size.log2()).where(size > 0, torch.nan)  # a block of zeros tells nothing
    for dim in (1, 0):
        off = off - off.nanmedian(dim, keepdim=True).values
    two = off.abs().nan_to_num(0).flatten().topk(min(2, off.numel()))
    if off.numel() < 2 or two.values[0] < LONE + two.values[1]:
        return None
    return list(divmod(int(two.indices[0]), off.shape[1]))


def kind_of(c: ModelConfig, layer: int | None) -> str:
    """Return words for the kind of a layer: layers of one kind have one line in the report."""
    if layer is None:
        return "embedding, norm, head"
    ratio = {0: "window", 4: "CSA"}.get(c.compress_ratio(layer), "HCA")
    attention = {"mla": "MLA", "dsa": "DSA", "compressed": ratio}.get(c.attention, c.attention)
    attention += " by another layer's choice" if c.index_source(layer) != layer else ""
    experts = "experts by table" if c.is_hashed(layer) else "experts"
    mtp = "multi-token prediction, " if layer >= c.n_layers else ""
    return f"{mtp}{attention}, {experts if c.is_moe(layer) else 'dense'}"


# --- transformers' blocks


class Peer:
    """transformers' model of a folder's config without memory, of which one block at a time gets weights."""

    def __init__(self, config: Any, transformers: Any, dtype: torch.dtype, v4: bool) -> None:
        with torch.device("meta"):
            self.model: Any = transformers.AutoModel.from_config(config, attn_implementation="eager", dtype=dtype)
        self.model.eval()
        self.v4: bool = v4
        self.blocks: Any = self.model.layers
        self.model.embed_tokens, self.model.norm = Constant(config.hidden_size, dtype), nn.Identity()
        if hasattr(self.model, "hc_head"):
            self.model.hc_head = nn.Identity()
        for module in [*self.model.modules()]:  # they have no weights, but tables that the config makes
            if hasattr(module, "rotary_emb"):
                module.rotary_emb = type(module.rotary_emb)(config)

    @torch.no_grad()
    def run(
        self,
        layer: int,
        states: Tensor,
        tokens: Tensor,
        chosen: Tensor,
        there: PretrainedTensors,
        parts: Mapping[str, list[Part]],
    ) -> Tensor:
        """Return a block's output. Args: chosen: keys for a block without indexer; parts: the block's, of `there`."""
        block, by_name = self.blocks[layer], {part.name: part for of in parts.values() for part in of}
        weights: dict[str, Tensor] = {}
        for name, meta in block.state_dict().items():
            weights[name] = torch.empty(meta.shape, dtype=meta.dtype)
            for theirs, place in pieces(f"model.layers.{layer}.{name}", tuple(meta.shape), self.v4).items():
                weights[name][place] = there.read(by_name[theirs], meta.dtype)
        block.load_state_dict(weights, assign=True)
        weights.clear()
        self.model.layers, outputs = nn.ModuleList([block]), []
        # no index of theirs is -1; a query that sees few keys sees key 0
        given = {"prev_topk_indices": chosen.clamp(min=0)}

        def changed(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
            return (states, *args[1:]), options | {name: value for name, value in given.items() if name in options}

        hooks = [
            block.register_forward_pre_hook(changed, with_kwargs=True),
            block.register_forward_hook(lambda _, __, result: outputs.append(result)),
        ]
        self.model(input_ids=tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        block.to("meta")
        return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


class Constant(nn.Module):
    """Stands in for an embedding."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width: int = width
        self.dtype: torch.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, self.width, dtype=self.dtype)


def pieces(name: str, shape: tuple[int, ...], v4: bool) -> dict[str, Any]:
    """Return the tensors of a folder that make one of transformers', each with its place there."""
    if v4:
        released = in_released_names({name: Stored("F32", shape, (Path(name),))})
        return {one: (stored.within or ("", ()))[1] or ... for one, stored in released.items()}
    packed = re.fullmatch(r"(.+\.experts)\.(gate_up|down)_proj", name)
    if packed is None:
        return {name: ...}
    kinds = packed[2].split("_")
    rows = shape[1] // len(kinds)
    return {
        f"{packed[1]}.{i}.{kind}_proj.weight": (i, slice(k * rows, (k + 1) * rows))
        for i in range(shape[0])
        for k, kind in enumerate(kinds)
    }


def peer_of(folder: Path, c: ModelConfig, dtype: torch.dtype) -> tuple[Peer | None, str]:
    """Return transformers' model of a folder; None, with the reason, where it has none."""
    try:
        transformers = import_module("transformers")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if c.attention in TOPK:
            config.index_topk = TOPK[c.attention]
        return Peer(config, transformers, dtype, is_v4(c)), f"transformers {transformers.__version__}"
    except ImportError:
        return None, "transformers is not installed"
    except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        said = (str(error).splitlines() or ["no reason"])[0]
        return None, f"transformers has no such model: {said[:100]}"
