"""An agent's process for tests/it/dapr_agents.rs: the functions of the real dapr-agents, a command and a reply in JSON a line each.

It begins with "ready". `install` gets the arguments of python/shared_context_storage.py, or null for dapr-agents alone.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "python"))

import shared_context_storage
from dapr_agents.observability import context_storage
from dapr_agents.observability.context_propagation import create_child_span_with_context, restore_otel_context
from dapr_agents.observability.wrappers.workflow import WorkflowRunWrapper
from dapr_agents.observability.wrappers.workflow_task import WorkflowActivityRegistrationWrapper
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())
tracer = trace.get_tracer("agent")


def ids(span_context):
    return "%032x-%016x" % (span_context.trace_id, span_context.span_id) if span_context else None


def schedule(instance_id):
    """Schedules a workflow, as far as traces go. Returns the ids of its span."""
    with tracer.start_as_current_span("invoke_agent") as span:
        WorkflowRunWrapper._store_context(instance_id)
        return ids(span.get_span_context())


def task(instance_id):
    """Runs a task of the workflow. Returns the ids of its span's parent, and of what is restored."""
    context = WorkflowActivityRegistrationWrapper._resolve_context(instance_id)
    restored = restore_otel_context(context)
    with create_child_span_with_context(tracer, "task", context) as span:
        parent = span.parent
    restored = restored and trace.get_current_span(restored).get_span_context()
    return {"parent": ids(parent), "restored": ids(restored), "stored": context}


def resume(instance_id):
    """Returns what the package hands out for a resumed workflow."""
    storage = context_storage._context_storage
    return storage.create_resumed_workflow_context(instance_id, "Clerk")


def cleanup(instance_id):
    return context_storage.cleanup_workflow_context(instance_id)


def stats(_):
    return context_storage.get_context_storage_stats()


def install(settings):
    if settings is None:
        context_storage._context_storage = context_storage.WorkflowContextStorage()
    else:
        shared_context_storage.install(**settings)


print("ready", flush=True)
for line in sys.stdin:
    command, argument = json.loads(line)
    print(json.dumps(globals()[command](argument)), flush=True)
