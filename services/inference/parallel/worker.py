"""A rank's process: `python -m services.inference.parallel.worker FD`, started by `Workers` and by nobody else.

It does what rank 0 says, in that order, and lives as long as the socket `FD`: the end of rank 0, however it came, is
the end of this process, whatever it waits for.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from services.common.process import settle
from services.inference.adapters.slot_pool import SlotPool
from services.inference.config import LOG_FORMAT
from services.inference.hosting.wire import encode, portable, receive
from services.inference.model.backend import load_decoder, pool_settings, set_threads, torch_runner
from services.inference.model.gpu_runner import GpuRunner
from services.inference.model.runner import ModelRunner
from services.inference.model.sampler import Sampler
from services.inference.parallel.collectives import Group, join
from services.inference.parallel.messages import Begin, Evict, Failed, Forward, Join, Load, Loaded, SetBlocks

log = logging.getLogger(__name__)

EXIT_ORPHANED = 1


def run(connection: socket.socket) -> None:
    """Follow rank 0 to its end; a fault of this rank's is said there before this process ends."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(receive(connection), messages), name="inbox", daemon=True).start()
    try:
        _follow(messages, connection)
    except Exception as error:
        connection.sendall(encode(Failed(portable(error))))
        raise


def _take_in(received: Iterator[Any], messages: queue.SimpleQueue[Any]) -> None:
    places: list[Path] = []
    for message in received:
        if isinstance(message, Begin):
            places.append(message.meeting.parent)
        messages.put(message)
    for place in places:
        shutil.rmtree(place, ignore_errors=True)  # for rank 0, which may have been killed
    os._exit(EXIT_ORPHANED)  # at once, from whatever collective: rank 0 will never come to it


def _follow(messages: queue.SimpleQueue[Any], connection: socket.socket) -> None:
    begin = messages.get()
    assert isinstance(begin, Begin)
    config, shard = begin.config, begin.shard
    set_threads(config)
    if config.device != "cpu":
        torch.cuda.set_device(shard.rank)
    ranks, pool = Group(shard), SlotPool(**pool_settings(config, begin.model, shard))
    decoder = load_decoder(config, begin.model, ranks)
    settle()
    connection.sendall(encode(Loaded()))
    assert isinstance(messages.get(), Join)
    join(shard, begin.meeting, config.device)
    runner: ModelRunner | GpuRunner | None = None
    while True:
        match messages.get():
            case SetBlocks() as blocks:
                runner = None  # its memory is the next one's
                runner = torch_runner(config, decoder, pool, Sampler(), ranks, blocks)
            case Load(adapter):
                pool.load(adapter)
            case Evict(digest):
                pool.evict(digest)
            case Forward(arguments):
                assert runner is not None, "a step before there is a cache"
                for error in pool.poll().values():
                    raise error
                runner.forward(*arguments)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 ends this process with itself
    logging.basicConfig(format=LOG_FORMAT)
    run(socket.socket(fileno=int(sys.argv[1])))
