"""What an instance costs in memory in dapr-agents' context_storage.py: a dict of dicts, by tracemalloc.

python3.11 benches/python_dict.py [<number of instances>]
"""

import sys
import tracemalloc
import uuid


def context(instance_id, n):
    """As the original stores it for a resumed instance, which is what it knows most of."""
    return {
        "traceparent": f"00-{n + 1:032x}-{n + 1:016x}-01",
        "tracestate": None,
        "instance_id": instance_id,
        "resumed": True,
        "debug_info": f"New trace created for resumed workflow {instance_id}",
    }


def main():
    instances = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    storage = {}
    for n in range(instances):
        instance_id = str(uuid.UUID(int=n))
        storage[instance_id] = context(instance_id, n)
    after, _ = tracemalloc.get_traced_memory()
    print(f"{(after - before) // instances} bytes per instance, of {instances}")


main()
