"""Train a byte-level GPT on real text through flash_attn2.

    python examples/train_gpt.py                        # the demo: sizes chosen by the device
    python examples/train_gpt.py --data some/folder     # other text than Python's own library
    python examples/train_gpt.py --attention sdpa       # the same run on another attention
    python examples/train_gpt.py --out runs/a --resume  # go on from runs/a/checkpoint.pt

The text is the standard library of the running Python, byte by byte; whole files are held out.
Ctrl-C finishes the step, saves a checkpoint and exits with code 130; a second one exits at once.
A run writes checkpoint.pt, history.json, sample.txt and loss.png to --out. Its last line says PASS
or FAIL: whether the held-out loss is below the unigram entropy of the held-out text by at least
--margin nats; the exit code is 0 or 1.

TFLOP/s follow the FlashAttention-2 paper (Section 4.2): 6 * parameters * tokens
+ 12 * layers * hidden * seqlen^2 * batch a step, not halved for the causal mask.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# On a busy machine OpenMP threads that spin while they wait cost far more than they save. Read
# when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from corpus import Corpus, load_corpus, unigram_entropy
from gpt import ATTENTIONS, GPT, GPTConfig
from torch import Tensor
from tqdm import tqdm

# Dense bf16 peak of the SXM parts, TFLOP/s, by a word in the device's name.
PEAK_TFLOPS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "A100": 312.0}

PRESETS = {
    "demo": {
        "cpu": {
            "layers": 4,
            "heads": 4,
            "hidden": 128,
            "seqlen": 256,
            "batch": 8,
            "steps": 900,
            "max_minutes": 2.5,
        },
        "cuda": {
            "layers": 12,
            "heads": 12,
            "hidden": 768,
            "seqlen": 1024,
            "batch": 32,
            "steps": 800,
            "lr": 1e-3,
            "compile": True,
            "max_minutes": 4.0,
        },
    },
    "smoke": {
        "cpu": {
            "layers": 2,
            "heads": 2,
            "hidden": 32,
            "seqlen": 64,
            "batch": 8,
            "steps": 100,
            "margin": 0.2,
        },
        "cuda": {
            "layers": 2,
            "heads": 2,
            "hidden": 128,
            "seqlen": 256,
            "batch": 8,
            "steps": 100,
            "margin": 0.2,
        },
    },
}
INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="sizes, by device (default: demo)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--out", default="runs/gpt", help="folder of the results (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--data", help="folder of text (default: Python's standard library)")
    add("--pattern", help="file names to read (default: *.py, or * with --data)")
    add("--attention", choices=ATTENTIONS, default="flash")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction, default=False)
    add("--layers", type=int)
    add("--heads", type=int)
    add("--kv-heads", type=int, help="fewer than --heads: grouped-query attention")
    add("--hidden", type=int)
    add("--seqlen", type=int)
    add("--batch", type=int)
    add("--steps", type=int)
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, default=100, help="steps between held-out losses")
    add("--eval-batches", type=int, default=8)
    add("--checkpoint-every", type=int, default=200)
    add("--log-every", type=int, default=10, help="steps between progress updates")
    add("--stop-after", type=int, help="stop at this step; the schedule still counts --steps")
    add("--max-minutes", type=float, help="stop training after so long")
    add("--sample-bytes", type=int, default=300)
    add("--prompt", default="def ")
    add("--margin", type=float, default=0.5, help="nats below the unigram entropy for PASS")
    return parser


# What a resumed run decides anew; every other setting comes from the checkpoint by default.
NOT_RESUMED = ("preset", "device", "out", "resume", "stop_after", "max_minutes")


def parse_settings(argv: list[str] | None = None) -> argparse.Namespace:
    """Settings of a run: typed ones win over the checkpoint's, those over the preset's."""
    parser = make_parser()
    typed = parser.parse_args(argv)
    device = typed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = PRESETS[typed.preset].get(device.partition(":")[0])
    if sizes is None:
        parser.error(f"--device is {device!r}, it must be cpu, cuda or cuda:N")
    parser.set_defaults(**sizes, device=device)
    if typed.resume:
        path = Path(typed.out) / "checkpoint.pt"
        if not path.exists():
            parser.error(f"--resume: there is no {path}")
        parser.set_defaults(**torch.load(path, weights_only=True)["settings"])
    return parser.parse_args(argv)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


def peak_tflops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in name), None)


@contextlib.contextmanager
def interrupt_flag() -> Iterator[list[bool]]:
    """A one-element list that the first SIGINT or SIGTERM sets to True; the next one kills."""
    asked = [False]
    before = {}

    def handle(number: int, _frame: object) -> None:
        asked[0] = True
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """One run: model, optimizer, text, history; all of it that changes goes into a checkpoint."""

    def __init__(self, settings: argparse.Namespace, corpus: Corpus) -> None:
        self.settings = s = settings
        self.device = torch.device(s.device)
        self.text_fingerprint = corpus.fingerprint()
        self.corpus = corpus.to(self.device)
        torch.manual_seed(s.seed)
        config = GPTConfig(
            n_layer=s.layers,
            n_head=s.heads,
            n_kv_head=s.kv_heads,
            hidden=s.hidden,
            max_seqlen=s.seqlen,
        )
        self.model = GPT(config, s.attention).to(self.device)
        self.forward = torch.compile(self.model) if s.compile else self.model
        self.optimizer = self._make_optimizer()
        self.bf16 = s.dtype == "bf16" or (s.dtype == "auto" and self.device.type == "cuda")
        self.step = 0
        self.history = {"train": [], "held_out": []}
        self._pending = []

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; weight decay on matrices alone."""
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=self.settings.lr, betas=(0.9, 0.95), fused=fused)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def train_step(self) -> None:
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, s.steps, s.lr)
        tokens, targets = self.corpus.batch(s.seed, self.step, s.batch, s.seqlen)
        with self.autocast():
            loss = self.forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._pending.append(loss.detach())
        self.step += 1

    def read_losses(self) -> float:
        """Move the losses since the last call into the history, waiting for them; the last one."""
        if self._pending:
            first = self.step - len(self._pending)
            losses = torch.stack(self._pending).tolist()
            self.history["train"] += [[first + i, loss] for i, loss in enumerate(losses)]
            self._pending.clear()
        return self.history["train"][-1][1] if self.history["train"] else math.nan

    @torch.no_grad()
    def held_out_loss(self, batches: int) -> float:
        """Mean loss in nats per byte over places spread evenly over the held-out text."""
        s = self.settings
        losses: list[Tensor] = []
        for tokens, targets in self.corpus.held_out_batches(batches, s.batch, s.seqlen):
            with self.autocast():
                losses.append(self.model(tokens, targets))
        return float(torch.stack(losses).mean())

    def save(self) -> Path:
        """Write the checkpoint; a crash while writing leaves the one before."""
        out = Path(self.settings.out)
        out.mkdir(parents=True, exist_ok=True)
        self.read_losses()
        kept = {k: v for k, v in vars(self.settings).items() if k not in NOT_RESUMED}
        state = {
            "settings": kept,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "text": self.text_fingerprint,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        path = out / "checkpoint.pt"
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        (out / "history.json").write_text(json.dumps(self.history))
        return path

    def load(self) -> None:
        path = Path(self.settings.out) / "checkpoint.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["text"] != self.text_fingerprint:
            raise ValueError(f"data: the text is not the one that {path} was trained on")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def run(self) -> str:
        """Train; returns why it stopped: "done", "interrupted" or "out of time"."""
        s = self.settings
        last = min(s.steps, s.stop_after or s.steps)
        deadline = time.monotonic() + 60 * (s.max_minutes or math.inf)
        speed = Speedometer(self)
        with (
            interrupt_flag() as interrupted,
            tqdm(total=s.steps, initial=self.step, desc="training", unit="step") as bar,
        ):
            while self.step < last and not interrupted[0] and time.monotonic() < deadline:
                self.train_step()
                bar.update()
                if self.step % s.log_every == 0 or self.step == last:
                    bar.set_postfix_str(f"loss {self.read_losses():.3f}, {speed.read()}")
                if self.step % s.eval_every == 0:
                    held_out = self.held_out_loss(s.eval_batches)
                    self.history["held_out"].append([self.step, held_out])
                    bar.write(f"step {self.step}: held-out loss {held_out:.3f} nats/byte")
                    speed.restart()
                if self.step % s.checkpoint_every == 0:
                    self.save()
                    speed.restart()
            self.save()
            if interrupted[0]:
                return "interrupted"
        return "done" if self.step >= last else "out of time"


class Speedometer:
    """Tokens/s, and on a GPU TFLOP/s and the share of peak, since the last reading."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        s = trainer.settings
        self.tokens = s.batch * s.seqlen
        self.flops = trainer.model.step_flops(s.batch, s.seqlen)
        self.on_gpu = trainer.device.type == "cuda"
        self.peak = peak_tflops(trainer.device) if self.on_gpu else None
        self.restart()

    def restart(self) -> None:
        self.since = (time.perf_counter(), self.trainer.step)

    def read(self) -> str:
        """Call right after the losses have been read, which waits for the GPU."""
        start, step = self.since
        rate = (self.trainer.step - step) / (time.perf_counter() - start)
        self.restart()
        text = f"{rate * self.tokens:,.0f} tokens/s"
        if self.on_gpu:
            tflops = rate * self.flops / 1e12
            share = f"{tflops / self.peak:.0%}" if self.peak else "unknown share"
            text += f", {tflops:.0f} TFLOP/s ({share} of peak)"
        return text


def plot_losses(history: dict, unigram: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*history["train"], strict=True), linewidth=0.7, alpha=0.6, label="training")
    if history["held_out"]:
        axes.plot(*zip(*history["held_out"], strict=True), marker="o", label="held-out")
    axes.axhline(unigram, color="grey", linestyle="--", label="unigram entropy of held-out text")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Byte-level GPT")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_sample(trainer: Trainer) -> str:
    s = trainer.settings
    prompt = torch.tensor(list(s.prompt.encode() or b"\n"), device=trainer.device)
    generator = torch.Generator(trainer.device).manual_seed(s.seed)
    with trainer.autocast():
        tokens = trainer.model.generate(prompt, s.sample_bytes, generator=generator)
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    (Path(s.out) / "sample.txt").write_text(text, encoding="utf-8")
    return text


def report(trainer: Trainer) -> bool:
    """Held-out loss, sample and plot; prints the verdict last and returns it."""
    s = trainer.settings
    unigram = unigram_entropy(trainer.corpus.held_out)
    loss = trainer.held_out_loss(4 * s.eval_batches)
    if trainer.history["train"]:
        plot_losses(trainer.history, unigram, Path(s.out) / "loss.png")
    print(
        f"\nSample (also in {s.out}/sample.txt):\n{'-' * 72}\n{write_sample(trainer)}\n{'-' * 72}"
    )
    print(f"Loss plot: {s.out}/loss.png; checkpoint: {s.out}/checkpoint.pt")
    print(f"Held-out loss after {trainer.step} steps: {loss:.4f} nats/byte, ", end="")
    print(f"{loss / math.log(2):.3f} bits/byte; unigram entropy {unigram:.4f} nats/byte")
    passed = loss <= unigram - s.margin
    relation = "is" if passed else "is not"
    print(
        f"{'PASS' if passed else 'FAIL'}: held-out loss {loss:.4f} {relation} at least "
        f"{s.margin} below the unigram entropy {unigram:.4f}"
    )
    return passed


def introduce(trainer: Trainer) -> None:
    s, corpus = trainer.settings, trainer.corpus
    where = "cpu"
    if trainer.device.type == "cuda":
        where = torch.cuda.get_device_name(trainer.device)
    print(
        f"Text: {corpus.files} files, {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.held_out):,} held out, unigram entropy "
        f"{unigram_entropy(corpus.train):.4f} and {unigram_entropy(corpus.held_out):.4f} nats/byte"
    )
    print(
        f"Model: {trainer.model.num_params():,} parameters, {s.layers} layers of {s.hidden}, "
        f"{s.heads} heads; {s.attention} attention, {'bf16' if trainer.bf16 else 'fp32'}, {where}"
    )
    print(f"Training: steps {trainer.step} to {s.steps}, {s.batch} x {s.seqlen} bytes a step")


def main(argv: list[str] | None = None) -> int:
    settings = parse_settings(argv)
    try:
        corpus = load_corpus(settings.data, settings.pattern)
        shortest = min(len(corpus.train), len(corpus.held_out))
        if shortest <= settings.seqlen + 1:
            raise ValueError(
                f"seqlen={settings.seqlen} is too long for a text with {shortest} bytes in a split"
            )
        trainer = Trainer(settings, corpus)
        if settings.resume:
            trainer.load()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    introduce(trainer)
    why = trainer.run()
    if why == "interrupted":
        print(
            f"\nInterrupted; checkpoint of step {trainer.step} saved. To go on:\n"
            f"    python {sys.argv[0]} --out {settings.out} --resume"
        )
        return INTERRUPTED
    if why == "out of time":
        print(f"Stopped at step {trainer.step}: --max-minutes {settings.max_minutes} are over")
    return 0 if report(trainer) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
