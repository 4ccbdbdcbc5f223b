"""All evidence for decoding, in the order in which it is gathered."""

from dsmini.diagnosis.decoding.evidence.batches import BATCHES_TOGETHER
from dsmini.diagnosis.decoding.evidence.context_slope import CONTEXT_SLOPE
from dsmini.diagnosis.decoding.evidence.roofline import DECODING_ROOFLINE
from dsmini.diagnosis.decoding.evidence.threads import DECODING_THREADS
from dsmini.diagnosis.decoding.evidence.weights import WEIGHTS

DECODING_EVIDENCE = (CONTEXT_SLOPE, BATCHES_TOGETHER, DECODING_THREADS, WEIGHTS, DECODING_ROOFLINE)
