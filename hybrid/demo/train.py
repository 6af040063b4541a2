"""Trains the demo model from nothing but the Python standard library's sources.

``python -m hybrid.demo.train --out DIR [--minutes M]`` writes an ordinary Hugging Face directory.
Until it is complete everything lies in ``DIR.partial``, saved every two minutes: interrupted or
killed, the same command goes on, and with fewer minutes than it has had it finishes at once.

The learning rate follows the clock and not the step count, so its decay ends when the time does,
however busy the machine is.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from hybrid.demo.corpus import stdlib_files
from hybrid.demo.evaluate import evaluate
from hybrid.demo.muon import Muon

CONTEXT = 1024
VOCABULARY = 2048
BATCH = 2  # windows of CONTEXT tokens a step
MUON_LEARNING_RATE = 0.015
ADAM_LEARNING_RATE = 3e-3
WARMUP = 0.02  # share of the time
BALANCE_WEIGHT = 0.02
SEED = 0
END_OF_TEXT = "<|endoftext|>"
SAVE_EVERY_S = 120.0
EVALUATE_EVERY_S = 300.0

ARCHITECTURE: dict[str, Any] = {  # 2.9 M parameters, of which 1.2 M work on a token
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "moe_intermediate_size": 64,
    "intermediate_size": 256,  # of dense layers, of which there are none
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "router_aux_loss_coef": BALANCE_WEIGHT,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

# What ``generate`` does unless told otherwise: greedy text of a model this small soon repeats.
SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.95,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

# The model only continues Python, so a conversation is the code so far: the messages, a line
# each. No newline ends the prompt, for the tokenizer keeps a newline and the indentation that
# follows it together.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if not loop.first and message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% endfor %}"
)

Tokens = npt.NDArray[np.int64]


def train_tokenizer(texts: Iterable[str]) -> Any:
    """Byte-level BPE over the training files; id 0 stands between documents.

    It also begins every prompt: without it a prompt reads like the middle of a file, cut anywhere.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, 0)],
    )
    fast: Callable[..., Any] = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: Any, texts: Iterable[str]) -> Tokens:
    """All texts as one array of token ids, each closed by the end token."""
    parts = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int64))
    return np.concatenate(parts)


def batch_at(tokens: Tokens, step: int) -> torch.Tensor:
    """The step's windows, ``[BATCH, CONTEXT]``; a pure function of the step.

    An epoch cuts the text into windows at its own offset and visits them in its own order.
    """
    per_epoch = (len(tokens) // CONTEXT - 1) // BATCH
    epoch, position = divmod(step, per_epoch)
    random = np.random.default_rng([SEED, epoch])
    offset = int(random.integers(CONTEXT))
    order = random.permutation(per_epoch * BATCH)[position * BATCH : (position + 1) * BATCH]
    starts = offset + order * CONTEXT
    return torch.from_numpy(np.stack([tokens[start : start + CONTEXT] for start in starts]))


def schedule(progress: float) -> float:
    """Factor on the learning rates when this share of the time has passed.

    Linear warm-up, then a cosine down to a hundredth.
    """
    if progress < WARMUP:
        return 0.05 + 0.95 * progress / WARMUP
    cosine = math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP)))
    return 0.01 + 0.99 * (1 + cosine) / 2


def losses(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, and the load-balancing loss (1 when balanced) as a mean over the layers.

    transformers' own sum of both pools the layers, which lets one layer starve an expert that
    another overuses; here each layer has to be balanced by itself.
    """
    config = model.config
    output = model(input_ids=batch, labels=batch, use_cache=False, output_router_logits=True)
    cross_entropy = output.loss - config.router_aux_loss_coef * output.aux_loss
    balance = torch.zeros(())
    for logits in output.router_logits:
        balance = balance + load_balancing_loss_func(
            (logits,), config.num_experts, config.num_experts_per_tok
        )
    return cross_entropy, balance / (config.num_hidden_layers * config.num_experts_per_tok)


class Training:
    """The model, its optimizer and how far they have come; goes on from a saved state."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(SEED)
        self.path = directory / "checkpoint.pt"
        self.step = 0
        self.elapsed_s = 0.0
        self.python = platform.python_version()  # whose library it learns from
        self.model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**ARCHITECTURE))
        # Measured on two cores in float32, tokens/s: eager 5,700, grouped_mm 4,100, batched_mm 190.
        self.model.set_experts_implementation("eager")
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            is_matrix = name.endswith(("_proj", "_proj.weight"))
            (matrices if is_matrix else others).append(parameter)
        # Embeddings, norms and routers are no maps between hidden spaces: they get Adam.
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=MUON_LEARNING_RATE),
            torch.optim.AdamW(others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base_learning_rates = (MUON_LEARNING_RATE, ADAM_LEARNING_RATE)
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.elapsed_s = state["step"], state["elapsed_s"]
            self.python = state["python"]

    def save(self) -> None:
        """Write the state aside and rename it: killed at any moment, an old or a new one stays."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "python": self.python,
        }
        aside = self.path.with_suffix(".aside")
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)

    def advance(self, tokens: Tokens, progress: float) -> float:
        """Take one optimizer step; returns its cross-entropy."""
        for optimizer, peak in zip(self.optimizers, self.base_learning_rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule(progress)
        cross_entropy, balance = losses(self.model, batch_at(tokens, self.step))
        (cross_entropy + BALANCE_WEIGHT * balance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return cross_entropy.item()

    def run(self, tokens: Tokens, budget_s: float, console: Console, report: Any) -> None:
        """Train until the time is spent, saving and reporting on the way."""
        self.model.train()
        saved_s = reported_s = self.elapsed_s
        mean_loss = math.log(VOCABULARY)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("starting", total=budget_s, completed=int(self.elapsed_s))
            try:
                while self.elapsed_s < budget_s:
                    began = time.monotonic()
                    loss = self.advance(tokens, self.elapsed_s / budget_s)
                    mean_loss += 0.02 * (loss - mean_loss)
                    if self.elapsed_s - reported_s >= EVALUATE_EVERY_S:
                        reported_s = self.elapsed_s
                        console.print(f"step {self.step}: {report()}")
                    if self.elapsed_s - saved_s >= SAVE_EVERY_S:
                        saved_s = self.elapsed_s
                        self.save()
                    self.elapsed_s += time.monotonic() - began
                    text = f"step {self.step}, loss {mean_loss:.2f}"
                    bar.update(task, description=text, completed=self.elapsed_s)
            finally:
                self.save()


def write_model(directory: Path, model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """Write what makes up an ordinary Hugging Face directory, and how it was made."""
    generation: Callable[..., Any] = GenerationConfig
    model.generation_config = generation(**SAMPLING)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Command line of ``python -m hybrid.demo.train``."""
    parser = argparse.ArgumentParser(
        prog="python -m hybrid.demo.train",
        description="Train the demo model on the Python standard library's sources.",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--minutes", type=float, default=40.0, help="training time (default 40)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    options = parser.parse_args()
    out: Path = options.out
    if out.exists():
        parser.error(f"{out} exists; remove it or choose another --out")
    if options.minutes <= 0 or options.threads <= 0:
        parser.error(
            f"--minutes is {options.minutes:g} and --threads {options.threads}; "
            "both must be above zero"
        )
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)

    training = Training(partial)
    if training.python != platform.python_version():
        parser.error(
            f"{partial} was begun with Python {training.python} and its library, this is "
            f"{platform.python_version()}; use that Python or remove the directory"
        )
    texts = stdlib_files(held_out=False)
    held_out = stdlib_files(held_out=True)
    tokenizer = train_tokenizer(texts.values())
    tokens = encode(tokenizer, texts.values())
    parameters = sum(p.numel() for p in training.model.parameters())
    console.print(
        f"{len(texts)} files with {len(tokens):,} tokens to train on, {len(held_out)} held out; "
        f"{parameters:,} parameters; step {training.step}"
    )

    def report() -> str:
        now = evaluate(training.model, tokenizer, [*held_out.values()], max_tokens=16 * CONTEXT)
        low, high = now.expert_share_range
        return f"held-out perplexity {now.perplexity:.2f}, expert shares {low:.3f} to {high:.3f}"

    try:
        training.run(tokens, options.minutes * 60, console, report)
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on, with fewer --minutes it finishes now")
        sys.exit(130)

    model = training.model.to(torch.bfloat16)
    measured = evaluate(model, tokenizer, [*held_out.values()])
    record = {
        "python": training.python,
        "training_files": len(texts),
        "training_tokens": len(tokens),
        "held_out_files": list(held_out),
        "held_out_tokens": measured.tokens,
        "parameters": parameters,
        "steps": training.step,
        "tokens_per_step": BATCH * CONTEXT,
        "wall_s": round(training.elapsed_s),
        "threads": options.threads,
        "held_out_perplexity": round(measured.perplexity, 2),
        "expert_share_range": [round(share, 4) for share in measured.expert_share_range],
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    write_model(partial, model, tokenizer, record)
    partial.rename(out)
    (out / training.path.name).unlink()
    console.print(f"held-out perplexity {measured.perplexity:.2f}; written to {out}")


if __name__ == "__main__":
    main()
