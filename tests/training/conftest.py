"""A run that was killed, for the tests of what is restored and of what is recorded."""

from pathlib import Path

import pytest

from tests.helpers.runs import RICH, die, new_run


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with everything on that was killed after step 4."""
    training = new_run(tmp_path_factory.mktemp("half"), **RICH)
    assert die(training, training.trainer, "forward_backward", 4)
    return training.folder
