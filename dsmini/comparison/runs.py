"""Run what a comparison lacks: each run in a process of its own on one thread, one for each core."""

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsmini.comparison.arms import Arm, Comparison
from dsmini.comparison.results import Results, made_otherwise
from dsmini.comparison.scoring import Ranges, choose_ranges, held_out
from dsmini.comparison.trial import request_of
from dsmini.console.progress import Progress
from dsmini.data.corpus import cache_next_to, load_corpus
from dsmini.data.documents import ProgressCallback
from dsmini.machine import cores


class StoppedError(Exception):
    """The processes of the runs were ended."""


class Workers:
    """The processes that are running. All that are left when the block ends are killed."""

    def __init__(self) -> None:
        self.running: dict[subprocess.Popen[str], float] = {}
        """Share of its run that each process has done."""
        self.closed: bool = False
        self.lock: threading.Lock = threading.Lock()

    def ask(self, request: str, what: str) -> Any:
        """Run a request (trial.py) in a process of its own and return its result.

        Raises: ValueError for what the run refuses, and if it breaks.
        """
        with self.lock:
            if self.closed:
                raise StoppedError
            process = subprocess.Popen(
                [sys.executable, "-m", "dsmini.comparison.trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C comes to the command alone
            )
            self.running[process] = 0.0
        assert process.stdin and process.stdout and process.stderr
        messages: list[str] = []
        listener = threading.Thread(target=lambda: messages.append(process.stderr.read()), daemon=True)  # pyright: ignore[reportOptionalMemberAccess]
        listener.start()
        try:
            print(request, file=process.stdin, flush=True)
            for line in process.stdout:
                said = json.loads(line)
                if "done" in said:
                    self.running[process] = said["done"]
                elif "error" in said:
                    raise ValueError(f"{what}: {said['error']}")
                else:
                    return said["result"]
            process.wait()
            listener.join()
            if self.closed:
                raise StoppedError
            last = ("".join(messages).strip() or f"status {process.returncode}").splitlines()[-1]
            raise ValueError(f"{what} broke: {last}")
        finally:
            with self.lock:
                self.running.pop(process, None)
            process.kill()
            process.wait()

    def close(self) -> None:
        """Kill the processes, and start no more."""
        with self.lock:
            self.closed = True
            for process in self.running:
                process.kill()


@contextmanager
def workers(number: int) -> Iterator[tuple[Workers, ThreadPoolExecutor]]:
    """Yield processes, and a pool of threads that each wait for one."""
    all_of_them, pool = Workers(), ThreadPoolExecutor(number)
    try:
        yield all_of_them, pool
    finally:
        all_of_them.close()
        pool.shutdown(cancel_futures=True)


def run_missing(
    comparison: Comparison,
    results: Results,
    seeds: int,
    jobs: int | None,
    made: Mapping[str, Any],
    ranges: Ranges,
    progress: Progress,
) -> int:
    """Do the runs of the seeds 0 to seeds - 1 that have no line yet, and return how many there were.

    Seed by seed, so that pairs become complete. A finished run is in the file at once.

    Args:
        jobs: number of runs at a time; None: one for each core, on a GPU one.
        made: as in results.opened.
        ranges: bytes of the held-out text on which all runs are scored.

    Raises: ValueError of a run, and where its sources were changed meanwhile; the others are ended.
    """
    missing = [
        (arm, seed)
        for seed, arm in itertools.product(range(seeds), comparison.arms)
        if not results.done(arm.name, seed)
    ]
    if not missing:
        return 0
    progress.total, waiting = len(missing), list(missing)
    at_a_time = jobs or (cores() if comparison.arms[0].config.train.device == "cpu" else 1)
    with workers(at_a_time) as (processes, pool):
        running: dict[Future[Any], tuple[Arm, int]] = {}
        shown = -1.0
        while waiting or running:
            while waiting and len(running) < at_a_time:
                arm, seed = waiting.pop(0)
                request = request_of(arm, seed, ranges, cache_next_to(results.path))
                running[pool.submit(processes.ask, request, f"{arm.name}, seed {seed}")] = arm, seed
            finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda done: done.exception() is not None):  # what is done is kept
                arm, seed = running.pop(future)
                line = {"arm": arm.name, "seed": seed, **future.result()}
                for what, theirs, ours in made_otherwise(line, made):
                    raise ValueError(f"{arm.name}, seed {seed} is of {what}, {theirs}, not {ours}; start again")
                results.add(line)
            names = ", ".join(f"{arm.name} seed {seed}" for arm, seed in running.values())
            whole = len(missing) - len(waiting) - len(running)
            share = whole + sum(processes.running.values())
            if share != shown:  # else a file would repeat the line while the last runs are scored
                progress.update(share, f"{whole}/{len(missing)} runs  {names}")
            shown = share
    return len(missing)


def read_corpora(comparison: Comparison, path: Path, progress: ProgressCallback) -> tuple[dict[str, str], Ranges]:
    """Tokenize what the arms train on, before their runs do.

    Return the hash of each arm's corpus, and the bytes of the held-out text on which all are scored.

    Raises: ValueError for a text that is too short.
    """
    found: dict[str, str] = {}
    for arm in comparison.arms:
        c = arm.config
        corpus = load_corpus(c.data, c.seq_len, c.model.vocab_size, cache_next_to(path), 0, progress=progress)
        found[arm.name] = corpus.sha256
    c = comparison.arms[0].config
    return found, choose_ranges(held_out(c.data, cache_next_to(path), progress), c.train.final_eval_tokens or 0)
