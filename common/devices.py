"""Seeds over several devices: each device trains its share of the seeds on its own copy of the data.

Arrays with a leading axis of seeds are split along it; programs then run where their arguments are, without a line
of their own. With one device nothing is moved.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def split_seeds(tree):
    """Splits arrays (seeds, ...) over all devices, if the seeds can be shared out evenly; else copies them."""
    num_seeds = len(jax.tree.leaves(tree)[0])
    return _place(tree, PartitionSpec("seeds" if num_seeds % jax.device_count() == 0 else None))


def replicate(tree):
    """Copies arrays to all devices."""
    return _place(tree, PartitionSpec())


def _place(tree, spec: PartitionSpec):
    if jax.device_count() == 1:
        return tree
    return jax.device_put(tree, NamedSharding(Mesh(np.array(jax.devices()), ("seeds",)), spec))
