"""`multilora base-models`: the base models that adapters are checked against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.output import App, Format, Output, Row, print_rows
from services.cli.targets import UINT32_MAX, Targets, targets
from services.common.errors import NotFound

if TYPE_CHECKING:
    from multilora.adapter_store.v1 import admin_pb2

app = App(help="Base models in the adapter store.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def register(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name to register it by: the one replicas serve it under.")
    ],
    config: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="The model's config.json.")] = None,
    model: Annotated[Path | None, typer.Option(exists=True, help="A model directory, or a .gguf file.")] = None,
    from_server: Annotated[bool, typer.Option("--from-server", help="Ask the inference service.")] = False,
    accept: Annotated[
        list[str] | None, typer.Option(help="A base_model_name_or_path to accept, beside NAME; repeatable.")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, max=UINT32_MAX, help="Highest rank the fleet's replicas hold.")
    ] = None,
) -> None:
    """Register a base model. Its shapes come from --config, --model or --from-server: give one of them."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    if (config is not None) + (model is not None) + from_server != 1:
        raise typer.BadParameter("give exactly one of --config, --model and --from-server")
    where = targets(context)
    request = admin_pb2.RegisterBaseModelRequest(
        name=name,
        config_json=_config_json(where, config, model),
        accepted_names=accept or [],
        max_lora_rank=max_lora_rank,
    )
    with store_admin(where) as store:
        answer = store.RegisterBaseModel(request, timeout=where.timeout)
    profile = answer.profile
    typer.echo(f"{profile.name} {'was there already' if answer.existed else 'is registered'}: {_summary(profile)}")


@app.command("list")
def list_(context: typer.Context, output: Output = Format.TABLE) -> None:
    """List the registered base models."""
    from multilora.adapter_store.v1 import admin_pb2
    from services.cli.clients import store_admin

    where = targets(context)
    with store_admin(where) as store:
        answer = store.ListBaseModels(admin_pb2.ListBaseModelsRequest(), timeout=where.timeout)
    columns = ("name", "architecture", "num_layers", "modules", "vocab_size", "max_lora_rank", "accepted_names")
    rows = list(map(_row, answer.base_models))
    print_rows(rows, columns=columns, output=output, empty="no base models")


def _config_json(where: Targets, config: Path | None, model: Path | None) -> str:
    if config is not None:
        return config.read_text(encoding="utf-8", errors="replace")
    if model is not None:
        return config_of(model)
    from multilora.inference.v1 import inference_pb2
    from services.cli.clients import inference

    with inference(where) as client:
        return client.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=where.timeout).config_json


def config_of(model: Path) -> str:
    """The config.json of a model directory, or what a .gguf file says in its place."""
    if model.is_dir():
        if not (model / "config.json").is_file():
            raise NotFound(
                "FILE_NOT_FOUND", f"{model} has no config.json; give a Hugging Face directory or a .gguf file"
            )
        return (model / "config.json").read_text(encoding="utf-8", errors="replace")
    from services.common.gguf_config import config_from_gguf, open_gguf

    return json.dumps(config_from_gguf(open_gguf(model)))


def _summary(profile: admin_pb2.BaseModelProfile) -> str:
    return f"{profile.num_layers} layers, {len(profile.modules)} modules, adapters to rank {profile.max_lora_rank}"


def _row(profile: admin_pb2.BaseModelProfile) -> Row:
    return {
        "name": profile.name,
        "architecture": profile.architecture,
        "num_layers": profile.num_layers,
        "modules": len(profile.modules),
        "vocab_size": profile.vocab_size,
        "max_lora_rank": profile.max_lora_rank,
        "accepted_names": list(profile.accepted_names),
    }
