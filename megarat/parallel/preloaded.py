"""What the fork server of ``megarat.parallel.worlds`` imports once, before any rank exists."""

import gc

import torch

from megarat.engine import warm_up

torch.set_num_threads(1)
warm_up()
gc.freeze()  # DeepSpeed collects garbage whenever it builds an engine: half a second through all that is imported here, in every rank
