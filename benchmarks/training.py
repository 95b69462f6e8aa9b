"""``training``: GPT training end to end as in the paper's Table 1, attention providers in turns."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from tqdm import tqdm

from . import report, timing
from .providers import Provider, select_providers

METHOD = (
    "One optimizer step of the GPT of examples/gpt.py: bf16 parameters, fused AdamW, random "
    "tokens, {tokens} tokens a step, vocabulary {vocab}; compiled blocks: {compiled} "
    "(torch.compile around the attention, which runs as its own call). Providers take turns on one "
    "model, {rounds} rounds of {steps} steps after one that is not counted; the median step, by "
    "CUDA events. TFLOP/s = (6*N*tokens + 12*layers*hidden*seqlen^2*batch) / time with N all "
    "parameters, embeddings included, and the attention term not halved for the causal mask."
)

# (layers, heads, hidden); "tiny" serves a trial without a GPU.
SIZES = {"355M": (24, 16, 1024), "1.3B": (24, 16, 2048), "tiny": (2, 2, 32)}


class AttentionSwitch:
    """The attention of a model whose provider changes between steps, outside compiled code."""

    def __init__(self, provider: Provider):
        self.provider = provider

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.provider.attend(q, k, v, True)


def build_model(size: str, vocab: int, seqlen: int, switch: AttentionSwitch, device: torch.device):
    """A bf16 GPT on ``device`` that attends through ``switch``."""
    from examples.gpt import GPT, GPTConfig

    layers, heads, hidden = SIZES[size]
    config = GPTConfig(n_layer=layers, n_head=heads, hidden=hidden, vocab=vocab, max_seqlen=seqlen)
    with device:
        model = GPT(config, attention=torch.compiler.disable(switch.attend))
    return model.to(torch.bfloat16)


def make_step(model, batch: int, seqlen: int, vocab: int, device: torch.device) -> Callable:
    """A function that takes one optimizer step on random tokens and returns the loss tensor."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(vocab, (batch, seqlen + 1), device=device)

    def step():
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def measure(
    args: argparse.Namespace, size: str, seqlen: int, providers: list[Provider]
) -> list[dict]:
    """One row per provider for a model size and context length."""
    device = torch.device(args.device)
    batch = args.tokens // seqlen
    switch = AttentionSwitch(providers[0])
    torch.manual_seed(0)
    model = build_model(size, args.vocab, seqlen, switch, device)
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    step = make_step(model, batch, seqlen, args.vocab, device)
    losses = {}

    def step_with(provider: Provider) -> Callable:
        def call():
            switch.provider = provider
            losses[provider.name] = step()

        return call

    runners = [timing.Runner(p.name, [step_with(p)], p.context) for p in providers]
    timing.take_turns(timing.make_clock(device), runners, args.rounds, args.steps, math.inf)
    flops = model.step_flops(batch, seqlen)
    parameters = model.num_params()
    return [
        result_row(size, seqlen, batch, parameters, flops, runner, losses) for runner in runners
    ]


def result_row(
    size: str,
    seqlen: int,
    batch: int,
    parameters: int,
    flops: float,
    runner: timing.Runner,
    losses: dict[str, torch.Tensor],
) -> dict:
    """The record of one provider, with the error in place of numbers if it failed."""
    row = {"model": size, "parameters": parameters, "seqlen": seqlen, "batch": batch,
           "provider": runner.name, "error": runner.error}  # fmt: skip
    if runner.error is not None:
        return row
    loss = losses[runner.name].item()
    if not math.isfinite(loss):
        return row | {"error": f"the loss became {loss}"}
    stats = timing.summarize(runner.samples)
    seconds = stats.median * 1e-3
    return row | {"ms": stats.median, "p20": stats.p20, "p80": stats.p80, "steps": stats.count,
                  "tokens_per_s": batch * seqlen / seconds,
                  "tflops": flops / seconds * 1e-12, "loss": loss}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--providers", nargs="+", metavar="KEY",
                        help="keys or names, or all (default: ours flash cudnn)")  # fmt: skip
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["355M", "1.3B"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a step")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="counted steps in a turn")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)


def run(args: argparse.Namespace) -> int:
    """Trains each size at each length, writes and prints; 1 when a provider of ours failed."""
    import torch._dynamo

    device = torch.device(args.device)
    providers = select_providers(device, args.providers)
    results = {
        "kind": "training",
        "environment": report.environment(device, args.commit),
        "method": METHOD.format(compiled=args.compile, **vars(args)),
        "rows": (rows := []),
    }
    cells = [(size, seqlen) for size in args.sizes for seqlen in args.seqlens]
    timing.raise_clocks(device)
    for size, seqlen in (progress := tqdm(cells, unit="model", disable=None)):
        progress.set_postfix_str(f"{size}, {seqlen} tokens")
        rows += measure(args, size, seqlen, providers)
        path = report.save(args, results)
        torch._dynamo.reset()
        timing.release_memory(device)
    print(report.rows_markdown(rows))
    print(path)
    return 1 if any(row["error"] and report.is_ours(row["provider"]) for row in rows) else 0
