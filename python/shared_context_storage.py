"""Keeps dapr-agents' workflow contexts where Rust workers of tracing-workflow-context keep theirs (with `Form::Json`).

    shared_context_storage.install("redis://127.0.0.1:6379/")  # or "postgres://..", in each process
Settings as in Rust: `namespace`; `prefix` (Redis); `table` (PostgreSQL; a Rust worker creates it). Nothing is raised into a
workflow, and no call waits for the server longer than `budget` seconds: what it does not take is kept in this process."""
import json, time
from multiprocessing.pool import ThreadPool
from dapr_agents.observability import context_propagation, context_storage
from opentelemetry import context as otel

def install(url, **settings):
    context_storage._context_storage = SharedContextStorage(url, **settings)

class SharedContextStorage(context_storage.WorkflowContextStorage):
    def __init__(self, url, namespace="", ttl=24 * 3600, budget=1, **names):
        super().__init__(ttl=ttl)
        self._get, self._put, self._remove = (_redis if url.startswith("redis") else _postgres)(url, ttl, **names)
        self._namespace = _escaped(namespace) + "\x1d" if namespace else ""
        self._budget, self._late, self._errors = budget, None, 0
        self._pool = ThreadPool(4, otel.attach, [otel.set_value(otel._SUPPRESS_INSTRUMENTATION_KEY, True)])

    def store_context(self, instance_id, otel_context):
        value = {name: otel_context.get(name) or None for name in ("traceparent", "tracestate", "debug_info")}
        value.update(instance_id=_id(instance_id), resumed=otel_context.get("resumed") is True, recorded_at=time.time())
        if not (value["traceparent"] and self._ask(self._put, instance_id, value)):
            super().store_context(_id(instance_id), otel_context)

    def get_context(self, instance_id):
        return self._ask(self._get, instance_id) or super().get_context(_id(instance_id))

    def cleanup_context(self, instance_id):
        self._ask(self._remove, instance_id)
        super().cleanup_context(_id(instance_id))

    def create_resumed_workflow_context(self, instance_id, agent_name=None, stored_trace_context=None):
        token = otel.attach(context_propagation.restore_otel_context(self.get_context(instance_id)) or otel.get_current())
        try:
            return super().create_resumed_workflow_context(instance_id, agent_name, stored_trace_context)
        finally:
            otel.detach(token)

    def get_storage_stats(self):  # of this process
        return dict(super().get_storage_stats(), backend_errors=self._errors)

    def _ask(self, call, instance_id, *value):  # on a thread, since a client may hang; `None` if it fails
        try:
            if self._late is None or self._late.ready():  # else the server hangs
                answer = self._pool.apply_async(call, (self._namespace + _escaped(_id(instance_id)), *value))
                answer.wait(self._budget)
                self._late = None if answer.ready() else answer
                return answer.get(0)
        except Exception as error:
            self._errors += 1
            if self._errors & (self._errors - 1) == 0:  # the 1st, 2nd, 4th, 8th ..
                context_storage.logger.warning("%d calls failed, now by %s: %.200s", self._errors, type(error).__name__, error)

def _id(key, start="__workflow_context_"):  # the package's own keys are __workflow_context_{id}__
    return key[len(start) : -2] if key.startswith(start) and key.endswith("__") else key
def _escaped(text, escapes={"\x1e": "\x1e", "\x1f": " ", "\x1d": "-"}):
    return "".join("\x1e" + escapes[c] if c in escapes else c for c in text)

def _redis(url, ttl, prefix="workflow-context:"):
    import redis
    server, start = redis.Redis.from_url(url), _escaped(prefix) + "{"
    name = lambda key: start + _escaped(key, {"\x1e": "=", "{": "<", "}": ">"}) + "}"
    put = lambda key, value: server.set(name(key), json.dumps(value), px=int(ttl * 1000), nx=not value["resumed"]) or True
    return lambda key: json.loads(server.get(name(key)) or "null"), put, lambda key: server.delete(name(key))

def _postgres(url, ttl, table="public.workflow_contexts"):
    import psycopg
    def run(sql, *values):
        with psycopg.connect(url) as server: return server.execute(sql.format(table), values)
    get, remove = "SELECT context FROM {} WHERE id = sha256(%s) AND expires_at > now()", "DELETE FROM {} WHERE id = sha256(%s)"
    put = """INSERT INTO {} AS t (key, context, expires_at) VALUES (%s, %s, now() + %s * interval '1 second')
        ON CONFLICT (id) DO UPDATE SET record = NULL, context = excluded.context, expires_at = excluded.expires_at
        WHERE %s OR t.expires_at <= now()"""
    return (lambda key: (run(get, key.encode()).fetchone() or [None])[0],
            lambda key, value: run(put, key.encode(), json.dumps(value).replace("\\u0000", ""), ttl, value["resumed"]),
            lambda key: run(remove, key.encode()))
