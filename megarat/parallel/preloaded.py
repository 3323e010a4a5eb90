"""What the fork server of ``megarat.parallel.worlds`` imports once, before any rank exists."""

import torch

from megarat.engine import warm_up

torch.set_num_threads(1)
warm_up()
