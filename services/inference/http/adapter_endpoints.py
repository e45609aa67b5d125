"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM's clients call them."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from services.common.auth.callers import note
from services.common.errors import InvalidArgument
from services.inference.http.body import read_object
from services.inference.replica_control import ReplicaControl


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    lora_name: str = Field(min_length=1)

    @classmethod
    def parse(cls, body: dict[str, Any]) -> Self:
        """Raises InvalidArgument naming the field that is unknown, missing or of the wrong type."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = ".".join(map(str, first["loc"]))
            raise InvalidArgument("INVALID_FIELD", f"{name}: {first['msg']}", field=name) from error


class LoadBody(_Body):
    """lora_path: beneath --adapter-root; without it the store's adapter of that name is loaded.

    load_inplace: the name means the loaded files from now on, whatever it meant before
    """

    lora_path: str | None = None
    load_inplace: bool = False


class UnloadBody(_Body):
    """drain_timeout: seconds that running requests have to finish; without it all of them are waited for.

    lora_int_id: vLLM's own number, which names nothing here
    """

    lora_int_id: int | None = None
    drain_timeout: float | None = None


class AdapterEndpoints:
    def __init__(self, control: ReplicaControl) -> None:
        self._control = control

    async def load(self, request: Request) -> Response:
        body = LoadBody.parse(await read_object(request))
        note(path=body.lora_path or "", promote=body.load_inplace)
        loaded = await self._control.load(body.lora_name, body.lora_path or "", promote=body.load_inplace)
        versions = ", ".join(f"version {each.adapter.version} ({each.tier})" for each in loaded)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully: {versions}.")

    async def unload(self, request: Request) -> Response:
        body = UnloadBody.parse(await read_object(request))
        cancelled = await self._control.unload(body.lora_name, body.drain_timeout)
        cut = f"; {cancelled} requests were cancelled" if cancelled else ""
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully{cut}.")
