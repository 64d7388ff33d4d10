"""`layerzero-tune explain`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.dispatch import publish_snapshot, set_policy
from layerzero_runtime.explanation import explain_in
from layerzero_runtime.operations import operation_named
from layerzero_tune.command_line.options import JsonOption, use_tables
from layerzero_tune.command_line.output import console, print_json

Size = Annotated[int | None, typer.Option()]


def explain_command(
    operation: Annotated[str, typer.Option(help="Operation, such as attention.causal.")],
    dtype: Annotated[str, typer.Option(help="Data type by torch's name, such as bfloat16.")],
    mode: Annotated[str, typer.Option(help="eager or graph.")] = "eager",
    batch_size: Size = None,
    seq_len_q: Size = None,
    seq_len_k: Size = None,
    num_heads: Size = None,
    num_kv_heads: Size = None,
    head_dim: Size = None,
    v_head_dim: Size = None,
    causal_alignment: Annotated[str, typer.Option(help="top_left or bottom_right.")] = "top_left",
    layout: Annotated[str, typer.Option(help="bhsd or bshd.")] = "bhsd",
    attn_mask: Annotated[str, typer.Option(help="none, bool or float.")] = "none",
    dropout_p: Annotated[float, typer.Option()] = 0.0,
    scale: Annotated[float | None, typer.Option()] = None,
    rows: Size = None,
    hidden_size: Size = None,
    in_features: Size = None,
    out_features: Size = None,
    weight_dtype: Annotated[str, typer.Option(help="If it is not the input's.")] = "",
    offset: Annotated[float, typer.Option(help="Added to the weight of norm.rms.")] = 0.0,
    has_bias: Annotated[bool, typer.Option("--has-bias")] = False,
    approximate: Annotated[str, typer.Option(help="GELU: none or tanh.")] = "none",
    scale_x: Annotated[str, typer.Option(help="Scales of a quantised input: tensor, or row.")] = "tensor",
    scale_w: Annotated[str, typer.Option(help="Scales of a quantised weight: tensor, or row.")] = "tensor",
    requires_grad: Annotated[bool, typer.Option("--requires-grad")] = False,
    requires_deterministic: Annotated[bool, typer.Option("--requires-deterministic")] = False,
    output_dtype: Annotated[str, typer.Option(help="If it is not the usual one.")] = "",
    quant_format: Annotated[str | None, typer.Option(help="int8 or fp8.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")] = "auto",
    tables: Annotated[Path | None, typer.Option("--tables", help="Folder of tables to look in first.")] = None,
    policy: Annotated[Path | None, typer.Option("--policy", help="Policy file to put in force.")] = None,
    json: JsonOption = False,
) -> None:
    """Say which kernel serves a call, from which bucket, by what margin, and why others do not."""
    given: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if name not in ("device", "tables", "policy", "json") and value is not None
    }
    spec = detect_device(device)
    context = SelectionContext(**given).with_device(spec)
    operation_named(context.operation).validate(context)
    if tables is not None:
        use_tables(tables, spec)
    if policy is not None:
        set_policy(str(policy))
    explanation = explain_in(publish_snapshot(), context)
    if json:
        print_json(asdict(explanation) | {"context": context.to_dict()})
    else:
        console.print(str(explanation), soft_wrap=True)
