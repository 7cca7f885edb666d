"""A Ray cluster of several nodes on this machine, as a process of its own that tests talk to.

    python tests/sweep_cluster.py NODES

Prints its address, then kills its last node for each line that it reads; ends with its standard input.
"""

import os
import sys
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

SMALL: Any = {"object_store_memory": 80 << 20, "num_gpus": 0}


def main(nodes: int) -> None:
    """Run until standard input ends. The head runs no tasks, so that none of its own work dies with a node."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
    workers = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(nodes)]
    cluster.wait_for_nodes()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        cluster.remove_node(workers.pop(), allow_graceful=False)
        sys.stdout.write("killed\n")
        sys.stdout.flush()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
