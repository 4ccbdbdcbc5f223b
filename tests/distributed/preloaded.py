"""Import once, in the fork server, what all ranks need. Nothing else imports this module."""

import gc
from importlib import import_module

# none is a command: `python -m` warns of a module that is imported already
for name in (
    *("tests.distributed.runs", "dsmini.training.start", "dsmini.inference.generation", "dsmini.distributed.world"),
    *("dsmini.training.saving", "dsmini_kernels.cpu", "torch._dynamo"),
):
    import_module(name)
gc.collect()
gc.freeze()  # a collection in a rank would touch, and so copy, the memory of all these modules
