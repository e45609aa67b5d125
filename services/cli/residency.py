"""`multilora adapters`: which adapters one replica holds, by an operator's hand."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.targets import targets

Reference = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="As requests name it: pirate, pirate@3, acme/pirate.")
]


def load(
    context: typer.Context,
    adapter: Reference,
    path: Annotated[
        str,
        typer.Option("--path", help="A PEFT directory on the replica, beneath its --adapter-root: registered first."),
    ] = "",
    promote: Annotated[bool, typer.Option("--promote", help="With --path: move `stable` to the new version.")] = False,
) -> None:
    """Bring an adapter to a replica before anyone asks for it."""
    from multilora.common.v1 import common_pb2
    from multilora.inference.v1 import control_pb2
    from services.cli.clients import control

    where = targets(context)
    with control(where) as client:
        request = control_pb2.LoadAdapterRequest(adapter=adapter, path=path, promote=promote)
        answer = client.LoadAdapter(request, timeout=where.timeout)
    for each in answer.adapters:
        tier = common_pb2.Tier.Name(each.tier).removeprefix("TIER_")
        typer.echo(f"{each.identity.adapter}@{each.identity.version} is loaded ({tier})")


def unload(
    context: typer.Context,
    adapter: Reference,
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", min=0, help="Seconds running requests have to finish; 0: wait for all.")
    ] = 0.0,
) -> None:
    """Hide an adapter on a replica until it is loaded again, and evict it once its requests have finished."""
    from multilora.inference.v1 import control_pb2
    from services.cli.clients import control

    where = targets(context)
    with control(where) as client:
        request = control_pb2.UnloadAdapterRequest(adapter=adapter, drain_timeout=drain_timeout)
        cancelled = client.UnloadAdapter(request, timeout=where.timeout).cancelled_requests
    typer.echo(f"{adapter} is unloaded; {cancelled} requests were cancelled")


def pin(context: typer.Context, adapter: Reference) -> None:
    """Load an adapter on a replica, and keep it resident."""
    from multilora.inference.v1 import control_pb2
    from services.cli.clients import control

    where = targets(context)
    with control(where) as client:
        answer = client.PinAdapter(control_pb2.PinAdapterRequest(adapter=adapter), timeout=where.timeout)
    for each in answer.adapters:
        typer.echo(f"{each.identity.adapter}@{each.identity.version} is pinned")


def unpin(context: typer.Context, adapter: Reference) -> None:
    """Let a pinned adapter be evicted again."""
    from multilora.inference.v1 import control_pb2
    from services.cli.clients import control

    where = targets(context)
    with control(where) as client:
        client.UnpinAdapter(control_pb2.UnpinAdapterRequest(adapter=adapter), timeout=where.timeout)
    typer.echo(f"{adapter} is unpinned")
