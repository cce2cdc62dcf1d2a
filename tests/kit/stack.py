"""The imports that every rank process needs, which take seconds: the server that ranks are forked from does them once.

Nothing here may start a thread or touch CUDA, which a fork would not survive.
"""

from __future__ import annotations

from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

use_cpu_where_no_cuda()
quiet_third_parties()

import deepspeed  # noqa: E402, F401
from megatron.core import parallel_state  # noqa: E402, F401

import nextlat_dist.training.run  # noqa: E402, F401
import tests.kit.jobs  # noqa: E402, F401
