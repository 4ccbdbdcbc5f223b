"""End the processes of a file after it, and call commands that refuse."""

from collections.abc import Callable, Sequence

import pytest

from dsmini.console.command import run
from tests.distributed import ranks


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        ranks.end_waiting_ranks()


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return the sentence with which a command ends with status 2."""

    def refused(main: Callable[..., int], args: Sequence[str]) -> str:
        monkeypatch.setattr("sys.argv", ["a command", *args])
        with pytest.raises(SystemExit) as stop:
            run(main)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return refused
