"""The command's answer for decoding."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dsmini.diagnosis.answer import Asked, DiagnosisAnswer, answer_of, chosen_of
from dsmini.diagnosis.decoding.evidence.every import DECODING_EVIDENCE
from dsmini.diagnosis.decoding.loading import decoded_model_of
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.decoding.work import DECODING

SECONDS, QUICK_SECONDS = 30.0, 18.0
"""Time of the rounds: decoding steps are short."""


def answer_decoding(
    what: Path | None,
    *,
    context: int | None,
    batch: int,
    quick: bool,
    rounds: int | None,
    only: Sequence[str] = (),
    command: str,
    on_part: Callable[[float, str], None],
) -> DiagnosisAnswer:
    """Diagnose decoding by a config, a run or a model's folder.

    Raises: ValueError for what is none of them, a context longer than the model's, and an intervention that does not
        apply.
    """
    chosen_of(DECODING, only)
    on_part(0.0, "reading")
    decoded = decoded_model_of(what)
    subject = DecodingSubject(decoded, batch, context)
    name = str(what or "the default config")
    facts = {
        "what": name + ("" if subject.trained else ", random weights"),
        "step": f"1 token of each of {batch} sequences, {subject.context} tokens in the cache of each",
        "weights": f"{subject.weight_dtype}, products and cache: {subject.compute_dtype}, "
        f"threads: {torch.get_num_threads()}",
        "text": subject.source,
    }
    asked = Asked(
        quick=quick,
        rounds=rounds,
        only=only,
        command=command,
        on_part=on_part,
        seconds=QUICK_SECONDS if quick else SECONDS,
        evidence=DECODING_EVIDENCE,
    )
    return answer_of(subject, DECODING, f"Diagnosis of decoding, {name}", facts, asked)
