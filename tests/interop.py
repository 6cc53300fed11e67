"""A worker in Python on the Redis keys of tracing-workflow-context (stored form JSON).

    interop.py read  URL INSTANCE_ID                                   prints traceparent, tracestate and resumed
    interop.py write URL INSTANCE_ID TRACEPARENT [TRACESTATE [EXPIRY]] stores the object of dapr-agents
    interop.py claim URL INSTANCE_ID TRACEPARENT                       stores it unless there is one; prints the winner
"""

import json
import sys

import redis


def key(instance_id):
    return "workflow-context:{%s}" % instance_id


def value(instance_id, traceparent, tracestate=None):
    return json.dumps(
        {
            "traceparent": traceparent,
            "tracestate": tracestate or None,
            "instance_id": instance_id,
            "resumed": True,
            "debug_info": f"New trace created for resumed workflow {instance_id}",
        }
    )


def main(command, url, instance_id, traceparent=None, tracestate=None, expiry=None):
    server = redis.Redis.from_url(url)
    if command == "read":
        context = json.loads(server.get(key(instance_id)))
        assert context["instance_id"] == instance_id, context
        assert isinstance(context["debug_info"], str), context
        assert 0 < server.ttl(key(instance_id)) <= 24 * 60 * 60
        assert abs(context["expires_at"] - context["recorded_at"] - 24 * 60 * 60) < 60, context
        print(context["traceparent"], context["tracestate"], context["resumed"])
    elif command == "write":
        ex = int(expiry) if expiry else None
        server.set(key(instance_id), value(instance_id, traceparent, tracestate), ex=ex)
    elif command == "claim":
        mine = value(instance_id, traceparent)
        there = server.set(key(instance_id), mine, nx=True, get=True, ex=3600)
        print(json.loads(there or mine)["traceparent"])
    else:
        sys.exit(__doc__)


main(*sys.argv[1:])
