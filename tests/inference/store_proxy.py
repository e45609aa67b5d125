"""Stands between a replica and a real store: holds pulls back, cuts them short or spoils their bytes when told to."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from multilora.adapter_store.v1 import store_pb2, store_pb2_grpc
from tests.conftest import StoreProcess

WAIT = 60


class StoreProxy(store_pb2_grpc.AdapterStoreServiceServicer):
    """Passes every call on to the store.

    gate: while it is clear, a pull stops after its first piece
    began: one permit for each pull that has sent that piece
    spoil: what becomes of the pieces after it, for one pull each
    pulls: by pack digest; offsets: where they began
    """

    def __init__(self, store: StoreProcess) -> None:
        self._channel = grpc.insecure_channel(store.address)
        self._stub = store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        self.address = ""
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Semaphore(0)
        self.spoil: list[Callable[[bytes], bytes]] = []
        self.pulls: Counter[str] = Counter()
        self.offsets: list[int] = []

    def GetBaseModel(
        self, request: store_pb2.GetBaseModelRequest, context: grpc.ServicerContext
    ) -> store_pb2.GetBaseModelResponse:
        try:
            return self._stub.GetBaseModel(request)
        except grpc.RpcError as error:
            pass_on(error, context)

    def ResolveAdapter(
        self, request: store_pb2.ResolveAdapterRequest, context: grpc.ServicerContext
    ) -> store_pb2.ResolveAdapterResponse:
        try:
            return self._stub.ResolveAdapter(request)
        except grpc.RpcError as error:
            pass_on(error, context)

    def PullAdapter(
        self, request: store_pb2.PullAdapterRequest, context: grpc.ServicerContext
    ) -> Iterator[store_pb2.PullAdapterResponse]:
        self.pulls[request.digest] += 1
        self.offsets.append(request.offset)
        gate = self.gate
        spoil = self.spoil.pop(0) if self.spoil else bytes
        try:
            data = b"".join(response.data for response in self._stub.PullAdapter(request))
        except grpc.RpcError as error:
            pass_on(error, context)
        yield store_pb2.PullAdapterResponse(data=data[:4096], total_size=len(data))
        self.began.release()
        assert gate.wait(timeout=WAIT)
        try:
            rest = spoil(data[4096:])
        except ConnectionError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        yield store_pb2.PullAdapterResponse(data=rest)

    @contextlib.contextmanager
    def holding(self, pulls: int = 1) -> Iterator[Callable[[], None]]:
        """Hold back pulls that begin inside; the function given waits until so many have begun."""
        self.gate.clear()

        def wait() -> None:
            for _ in range(pulls):
                assert self.began.acquire(timeout=WAIT), "no pull began"

        while self.began.acquire(blocking=False):
            pass
        try:
            yield wait
        finally:
            self.gate.set()

    @contextlib.contextmanager
    def letting_others_pass(self) -> Iterator[None]:
        """Hold back what is held until the end, but nothing that begins inside."""
        held, self.gate = self.gate, threading.Event()
        self.gate.set()
        try:
            yield
        finally:
            held.set()

    def close(self) -> None:
        self._channel.close()


def pass_on(error: grpc.RpcError, context: grpc.ServicerContext) -> Any:
    """The store's own status, details and all."""
    context.set_trailing_metadata(error.trailing_metadata())
    context.abort(error.code(), error.details())


@contextlib.contextmanager
def run_proxy(store: StoreProcess) -> Iterator[StoreProxy]:
    proxy = StoreProxy(store)
    server = grpc.server(ThreadPoolExecutor(16))
    store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(proxy, server)
    proxy.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield proxy
    finally:
        proxy.gate.set()
        server.stop(None).wait()
        proxy.close()
