"""The backend that serves a call, forced or not, and the words about it."""

import importlib
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ops
from dsmini.nn import causal_attention
from dsmini.ops import explanation
from tests.functional.conftest import Unserved
from tests.helpers.commands import ROOT
from tests.helpers.configs import refusal

KNOWN = "use one of reference, eager, cpu, triton, or auto"
X = torch.zeros(2)


def backend(name: str) -> ModuleType:
    """Kernels that answer with their name, but serve no whole numbers."""
    kernels: Any = ModuleType(name)

    def speak(x: Tensor) -> str:
        if not x.is_floating_point():
            raise Unserved("whole numbers")
        return name

    kernels.speak, kernels.Unserved, kernels.why_not = speak, Unserved, lambda _: None
    kernels.OPERATIONS, kernels.describe = ("speak", "sing"), lambda: f"made of {name}, with care"
    kernels.prepare = dict
    return kernels


@ops.operation("speak")
def speak(x: Tensor) -> str:
    return "reference"


@ops.eager("speak")
def speak_eager(x: Tensor) -> str:
    return "eager"


@ops.operation("whisper")
def whisper(x: Tensor) -> str:
    """Be an operation without an eager version, which the backend does not have."""
    return "reference"


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Provide a CPU backend, no Triton one, and nothing in the environment; return the names of loaded backends."""
    names: list[str] = []
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.setattr(ops, "_operations", lambda name: ("speak", "sing"))
    monkeypatch.setattr(
        ops, "_load", lambda name: names.append(name) or (backend(name) if name == "cpu" else "no GPU here")
    )
    return names


def test_a_call_whose_gradient_is_wanted_loads_no_kernels(loaded: list[str]) -> None:
    """They may have to be compiled first, and training does not use them."""
    for forced in (None, "cpu"):
        with ops.use(forced):
            loaded.clear()
            assert speak(torch.zeros(2, requires_grad=True)) == "eager" and not loaded
            with torch.no_grad():
                assert speak(torch.zeros(2, requires_grad=True)) == "cpu" and loaded == ["cpu"]


def test_the_device_chooses_unless_something_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ops.chosen(), speak(X)) == (None, "cpu")
    assert speak(X.long()) == "eager"  # which the backend does not serve
    for name in (None, "cpu", "triton"):  # none of them has it, and one cannot run at all
        with ops.use(name):
            assert whisper(X) == "reference"
    for value, name, spoken in (("eager", "eager", "eager"), ("auto", None, "cpu"), ("", None, "cpu")):
        monkeypatch.setenv(ops.VARIABLE, value)
        assert (ops.chosen(), speak(X)) == (name, spoken)


def test_arguments_are_named_in_any_order() -> None:
    q = torch.randn(1, 2, 3, 4)
    assert torch.equal(causal_attention(scale=0.5, documents=None, v=q, k=q, q=q), causal_attention(q, q, q, 0.5))


def test_use_overrides_the_environment_and_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.VARIABLE, "reference")
    for choice in (None, "auto"):
        with ops.use(choice):
            assert (ops.chosen(), speak(X)) == (None, "cpu")
            with ops.use("eager"):
                assert (ops.chosen(), speak(X)) == ("eager", "eager")
            assert (ops.chosen(), speak(X)) == (None, "cpu")
        assert (ops.chosen(), speak(X)) == ("reference", "reference")
    with pytest.raises(ZeroDivisionError), ops.use("cpu"):
        raise ZeroDivisionError
    assert ops.chosen() == "reference"


def test_a_backend_that_is_unknown_or_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use("cpu"):
        assert refusal(speak, X.long()) == (
            "backend 'cpu' is forced and cannot run speak: whole numbers; use another, or 'auto'"
        )
    with pytest.raises(ValueError, match=f"backend='cuda' is unknown; {KNOWN}"):
        ops.use("cuda").__enter__()
    monkeypatch.setenv(ops.VARIABLE, "triton")
    assert "'triton' is forced and cannot run speak: no GPU here" in refusal(speak, X)
    monkeypatch.setenv(ops.VARIABLE, "gpu")
    assert refusal(ops.chosen) == f"{ops.VARIABLE}='gpu' is unknown; {KNOWN}"
    assert "'gpu' is unknown" in refusal(speak, X)
    assert ops.explain() == f"{ops.VARIABLE}: {ops.VARIABLE}='gpu' is unknown; {KNOWN}"


def test_explain_names_the_backend_that_a_call_then_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.Operation, "declared", {"speak": speak, "whisper": whisper})

    def explained() -> list[explanation.Choice]:
        return [*explanation.choices("cpu").values()]

    silent = "reference"  # what whisper runs on: it has neither an eager version nor a kernel
    for forced, choice, why in (
        (None, ("cpu", ""), "no cpu kernel"),
        ("eager", ("eager", "forced"), "no eager version"),
        ("reference", ("reference", "forced"), "forced"),
        ("triton", ("none", "a call raises: triton is not here"), "no triton kernel"),
    ):
        with ops.use(forced):
            assert explained() == [choice, (silent, why)] and whisper(X) == silent
            assert "cannot run speak" in refusal(speak, X) if choice[0] == "none" else speak(X) == choice[0]
    assert "cpu: ready: made of cpu, with care\ntriton: not here: no GPU here\n" in ops.explain()
    monkeypatch.setattr(ops, "_load", lambda name: "no compiler")
    assert explained()[0] == ("eager", "cpu is not here") and speak(X) == "eager"

    def load(name: str) -> ModuleType:
        raise ValueError("DSMINI_CPU_ISA asks for what this CPU lacks")

    monkeypatch.setattr(ops, "_load", load)
    assert explained()[0] == ("none", "a call raises: cpu is not here")
    assert "DSMINI_CPU_ISA" in refusal(speak, X) and "cpu: not here: DSMINI_CPU_ISA asks" in ops.explain()


def test_every_operation_is_declared_once_and_every_version_has_one() -> None:
    declared = {
        name: path.relative_to(ROOT).with_suffix("")
        for path in (ROOT / "dsmini").rglob("*.py")
        for name in re.findall(r'^@ops\.operation\("(\w+)"', path.read_text(), re.MULTILINE)
    }
    for path in declared.values():
        importlib.import_module(".".join(path.parts))
    known = ops.Operation.declared.keys()
    assert len(declared) > 15 and known - {"speak", "whisper"} == declared.keys()
    assert {name for _, name in ops.Operation.fast} <= known, "a version under a misspelt name would never run"
    with pytest.raises(ValueError, match=r"declares the operation 'linear' again; it is that of dsmini\.nn\.layers"):
        ops.operation("linear")(lambda x: x)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Ledger:
    """A counter that stores what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def kernel_ran(self, call: ops.Call) -> None:
        assert call.operands[0] is call.args[0] is X
        self.told.append((call.name, call.result))


def test_counter_is_told_of_kernels_and_a_dispatch_mode_sees_pytorch_code() -> None:
    ledger = Ledger()
    with ops.counting(ledger):
        speak(X)
        speak(X.long())
        whisper(X)
    assert ledger.told == [("speak", "cpu")]
    with Watch():
        assert speak(X) == "eager"
        with ops.counting(ledger):  # a counter that is such a mode hears of kernels instead
            assert speak(X) == "cpu"
