"""A worker in Python on the records of tracing-workflow-context (stored form JSON), in Redis or PostgreSQL by the URL.

    interop.py read  URL INSTANCE_ID                                   prints traceparent, tracestate and resumed
    interop.py write URL INSTANCE_ID TRACEPARENT [TRACESTATE [EXPIRY]] stores the object of dapr-agents
    interop.py claim URL INSTANCE_ID TRACEPARENT                       stores it unless there is one; prints the winner
"""

import json
import sys


class Redis:
    def __init__(self, url):
        import redis

        self.server = redis.Redis.from_url(url)

    @staticmethod
    def key(instance_id):
        # In this order: the escape itself first.
        for c, escaped in [("\x1e", "="), ("{", "<"), ("}", ">")]:
            instance_id = instance_id.replace(c, "\x1e" + escaped)
        return "workflow-context:{%s}" % instance_id

    def get(self, instance_id):
        """Returns the object, and the seconds until it expires."""
        key = self.key(instance_id)
        return json.loads(self.server.get(key)), self.server.ttl(key)

    def set(self, instance_id, value, seconds):
        self.server.set(self.key(instance_id), json.dumps(value), ex=seconds)

    def claim(self, instance_id, value, seconds):
        """Stores the object unless there is one. Returns the one that is there."""
        mine = json.dumps(value)
        there = self.server.set(self.key(instance_id), mine, nx=True, get=True, ex=seconds)
        return json.loads(there or mine)


class Postgres:
    def __init__(self, url):
        import psycopg

        self.server = psycopg.connect(url, autocommit=True)

    def get(self, instance_id):
        row = self.server.execute(
            "SELECT context, extract(epoch FROM expires_at - now())::float8 FROM workflow_contexts"
            " WHERE id = sha256(%s) AND expires_at > now()",
            [instance_id.encode()],
        ).fetchone()
        return row

    def set(self, instance_id, value, seconds):
        self.server.execute(
            "INSERT INTO workflow_contexts (key, context, expires_at)"
            " VALUES (%s, %s, now() + coalesce(%s::float8, 24 * 3600) * interval '1 second')"
            " ON CONFLICT (id) DO UPDATE"
            " SET record = NULL, context = excluded.context, expires_at = excluded.expires_at",
            [instance_id.encode(), json.dumps(value), seconds],
        )

    def claim(self, instance_id, value, seconds):
        self.server.execute(
            "INSERT INTO workflow_contexts AS t (key, context, expires_at)"
            " VALUES (%s, %s, now() + %s::float8 * interval '1 second')"
            " ON CONFLICT (id) DO UPDATE"
            " SET record = NULL, context = excluded.context, expires_at = excluded.expires_at"
            " WHERE t.expires_at <= now()",
            [instance_id.encode(), json.dumps(value), seconds],
        )
        return self.get(instance_id)[0]


def value(instance_id, traceparent, tracestate=None):
    return {
        "traceparent": traceparent,
        "tracestate": tracestate or None,
        "instance_id": instance_id,
        "resumed": True,
        "debug_info": f"New trace created for resumed workflow {instance_id}",
    }


def main(command, url, instance_id, traceparent=None, tracestate=None, expiry=None):
    server = (Redis if url.startswith("redis") else Postgres)(url)
    if command == "read":
        context, seconds_left = server.get(instance_id)
        assert context["instance_id"] == instance_id, context
        assert isinstance(context["debug_info"], str), context
        assert 0 < seconds_left <= 24 * 60 * 60, seconds_left
        assert abs(context["expires_at"] - context["recorded_at"] - 24 * 60 * 60) < 60, context
        print(context["traceparent"], context["tracestate"], context["resumed"])
    elif command == "write":
        seconds = int(expiry) if expiry else None
        server.set(instance_id, value(instance_id, traceparent, tracestate), seconds)
    elif command == "claim":
        print(server.claim(instance_id, value(instance_id, traceparent), 3600)["traceparent"])
    else:
        sys.exit(__doc__)


main(*sys.argv[1:])
