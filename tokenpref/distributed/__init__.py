"""Process group, FSDP2 and collectives: the only folder that imports ``torch.distributed``."""

from tokenpref.distributed.sharding import gradient_sync, is_sharded, shard, unsharded
from tokenpref.distributed.state import full_state_dict, load_full_state_dict, load_sharded, save_sharded
from tokenpref.distributed.world import World, init_world, launched_by_torchrun, single_process_world

__all__ = [
    "World",
    "full_state_dict",
    "gradient_sync",
    "init_world",
    "is_sharded",
    "launched_by_torchrun",
    "load_full_state_dict",
    "load_sharded",
    "save_sharded",
    "shard",
    "single_process_world",
    "unsharded",
]
