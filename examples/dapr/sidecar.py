"""What stands in for Dapr's sidecar: the in-memory hub for tests of Microsoft's durabletask, on loopback.

Prints its port, and ends when its standard input is closed. Dapr's protocol is a descendant of Microsoft's, so the hub
speaks it but for what is adapted here.
"""

import os
import signal
import sys
from concurrent import futures

import grpc
from durabletask.internal import orchestrator_service_pb2 as pb
from durabletask.internal import orchestrator_service_pb2_grpc as service
from durabletask.testing import InMemoryOrchestrationBackend
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


class Hub(InMemoryOrchestrationBackend):
    """Hands on the trace context of whoever started an instance, as Dapr does. The hub as it is drops it."""

    def StartInstance(self, request, context):
        with self._lock:  # it is reentrant, and keeps the event from the worker until it is complete
            response = super().StartInstance(request, context)
            if request.HasField("parentTraceContext"):
                started = execution_started(self._instances[response.instanceId].pending_events)
                started.parentTraceContext.CopyFrom(request.parentTraceContext)
            return response

    def GetWorkItems(self, request, context):
        for item in super().GetWorkItems(request, context):
            if item.HasField("activityRequest"):
                activity = item.activityRequest
                with self._lock:
                    instance = self._instances[activity.orchestrationInstance.instanceId]
                    started = execution_started(instance.history)
                if started.HasField("parentTraceContext"):
                    activity.parentTraceContext.CopyFrom(started.parentTraceContext)
            yield item

    def _wait_for_state(self, instance_id, predicate, timeout):
        # Of a call without a deadline grpcio says that more time remains than a thread can wait.
        return super()._wait_for_state(instance_id, predicate, min(timeout or 60, 60))


def execution_started(events):
    return next(e.executionStarted for e in events if e.HasField("executionStarted"))


class DaprWireFormat(grpc.ServerInterceptor):
    """Field 5 of ScheduleTaskAction is a string at Dapr's, the id of the attempt, and a message at Microsoft's."""

    def __init__(self):
        file = descriptor_pb2.FileDescriptorProto()
        pb.DESCRIPTOR.CopyToProto(file)
        [action] = [m for m in file.message_type if m.name == "ScheduleTaskAction"]
        [field] = [f for f in action.field if f.number == 5]
        action.field.remove(field)

        pool = descriptor_pool.DescriptorPool()
        for dependency in pb.DESCRIPTOR.dependencies:
            pool.AddSerializedFile(dependency.serialized_pb)
        pool.AddSerializedFile(file.SerializeToString())
        name = pb.OrchestratorResponse.DESCRIPTOR.full_name
        self._without_field = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))

    def intercept_service(self, continuation, details):
        handler = continuation(details)
        if not details.method.endswith("/CompleteOrchestratorTask"):
            return handler
        return grpc.unary_unary_rpc_method_handler(
            handler.unary_unary, self._read, handler.response_serializer
        )

    def _read(self, wire):
        response = self._without_field.FromString(wire)
        response.DiscardUnknownFields()
        return pb.OrchestratorResponse.FromString(response.SerializeToString())


signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that holds the other end of standard input
server = grpc.server(futures.ThreadPoolExecutor(max_workers=10), interceptors=[DaprWireFormat()])
service.add_TaskHubSidecarServiceServicer_to_server(Hub(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
os._exit(0)  # a thread may still be waiting for an order to be done
