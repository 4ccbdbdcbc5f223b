"""Questions of python -m benchmarks, in the order of the page. To add one, write it in a module and name it here."""

from benchmarks.claims import shakespeare, sparse_training
from benchmarks.questions import diagnose, experts, fp8, kernels, kv_cache, peers, pipeline, sparse, steps

ASKED = (kv_cache.QUESTION, steps.DECODE, steps.TRAIN, fp8.ERRORS, fp8.STEP, experts.QUESTION, steps.PREFILL)
ASKED += (peers.QUESTION, kernels.QUESTION, sparse.QUESTION, pipeline.QUESTION, steps.PLAN, diagnose.QUESTION)
ASKED += (sparse_training.QUESTION, shakespeare.QUESTION)
QUESTIONS = {question.name: question for question in ASKED}
"""All questions by name. With --quick the first have time."""
