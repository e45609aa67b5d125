"""InferenceService: each handler checks, delegates and converts. What goes wrong is raised; the server's error
interceptor turns it into a status."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.inference.conversion import check_adapter_metadata, from_event, to_generation_request, to_prompt
from services.inference.serving import Serving

ADAPTER_METADATA = "x-multilora-adapter"

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Generation and what there is to know about the served model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Closing the call closes `events`, which stops the request at the engine's next step."""
        check_adapter_metadata(_adapter_metadata(context), request.adapter)
        generation = to_generation_request(request, context.time_remaining())
        async with contextlib.aclosing(self._serving.generate(generation)) as events:
            async for event in events:
                yield from_event(event)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, _context: Context
    ) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse(ids=self._serving.prompt_ids(to_prompt(request)))

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, _context: Context
    ) -> inference_pb2.DetokenizeResponse:
        ids = self._serving.prompt_ids(list(request.ids), field="ids") if request.ids else []
        text = self._serving.tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    async def GetModelInfo(
        self, _request: inference_pb2.GetModelInfoRequest, _context: Context
    ) -> inference_pb2.GetModelInfoResponse:
        model, adapters = self._serving.model, self._serving.config.adapters
        return inference_pb2.GetModelInfoResponse(
            model=model.name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            dtype=model.dtype_name,
            max_loras=adapters.num_slots,
            max_lora_rank=adapters.max_lora_rank,
            config_json=json.dumps(dict(model.hf_config)),
        )


def _adapter_metadata(context: Context) -> list[str]:
    return [str(value) for key, value in context.invocation_metadata() or () if key == ADAPTER_METADATA]
