"""Long-running operations in the registry, for when the controller that runs them is gone."""

from __future__ import annotations

from google.longrunning import operations_pb2

from controller.ports import Registry


class OperationStore:
    """See ``dumont.rpc.operations.Store``."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def save(self, operation: operations_pb2.Operation) -> None:
        await self._registry.save_operation(operation.name, operation.SerializeToString(), operation.done)

    async def find(self, name: str) -> operations_pb2.Operation | None:
        stored = await self._registry.operation(name)
        if stored is None:
            return None
        operation = operations_pb2.Operation()
        operation.ParseFromString(stored.content)
        return operation

    async def drop(self, name: str) -> None:
        await self._registry.drop_operation(name)
