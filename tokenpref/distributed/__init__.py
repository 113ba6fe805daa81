"""Process group, FSDP2 and collectives: the only folder that imports ``torch.distributed``."""

from tokenpref.distributed.float8_weights import refresh_float8_scales
from tokenpref.distributed.sharding import (
    compute_dtype_of,
    gradient_sync,
    is_sharded,
    register_forward,
    shard,
    unsharded,
)
from tokenpref.distributed.state import (
    BackgroundWrite,
    check_sharded,
    first_not_finite,
    full_state_dict,
    load_full_state_dict,
    load_sharded,
    other_values,
    own_parts,
    sharded_state,
    state_modules,
    state_parameters,
    write_sharded,
)
from tokenpref.distributed.world import World, init_world, launched_by_torchrun, single_process_world

__all__ = [
    "BackgroundWrite",
    "World",
    "check_sharded",
    "compute_dtype_of",
    "first_not_finite",
    "full_state_dict",
    "gradient_sync",
    "init_world",
    "is_sharded",
    "launched_by_torchrun",
    "load_full_state_dict",
    "load_sharded",
    "other_values",
    "own_parts",
    "refresh_float8_scales",
    "register_forward",
    "shard",
    "sharded_state",
    "single_process_world",
    "state_modules",
    "state_parameters",
    "unsharded",
    "write_sharded",
]
