"""A run that was stopped, for the tests of what is restored and of what is recorded."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import RICH, calls, kill, new_run, stopped, whole


@pytest.fixture(scope="session")
def never_and_stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return all of a run that nothing stopped, and the folder of an equal one that was stopped after step 4."""
    never, folder = new_run(tmp_path_factory.mktemp("never"), **RICH), tmp_path_factory.mktemp("stopped")
    assert never.train()
    want = whole(never)  # now: the random state in it is the process's
    training = new_run(folder, **RICH)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, training.trainer, "forward_backward", calls(training, 4, 0), False)
        stopped(training)
    return want, folder
