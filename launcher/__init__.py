"""Fine-tune a causal language model with PEFT and leave a self-describing run folder.

Read in this order: `__main__` (the front door), `variables` and `config` (what the user asked for), `plan` (what will be
done), `train` (the visible loop), `rundir` and `checkpoint` (what is left on disk), `evaluate` (did it learn).
"""

import logging

# bitsandbytes announces at import which optional kernels it did not find; nothing here needs them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
