"""The engine that runs the model, named without loading it: torch comes in where it is built, and nowhere else."""

from __future__ import annotations

import queue
from collections.abc import Callable

from services.inference.config import ServerConfig
from services.inference.engine.messages import EngineInput
from services.inference.hosting.interface import MessageLoop
from services.inference.model.config import ModelConfig

Inbox = queue.SimpleQueue[EngineInput]
ServedEngineBuilder = Callable[[ServerConfig, ModelConfig, Inbox], MessageLoop]


def model_engine(config: ServerConfig, model: ModelConfig, inbox: Inbox) -> MessageLoop:
    from services.inference.engine_builder import build_engine

    return build_engine(config, model, inbox)
