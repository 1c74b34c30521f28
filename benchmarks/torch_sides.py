"""PyTorch sides of the step benchmark: the official recipe's step, and TRL's DPOTrainer.

`official` is the step of the authors' trainer: K+1 padded rows per prompt, a pass of the reference
in every step, float32 logits at every position, gradient checkpointing. `official-keep` is the same
without checkpointing. `trl` is DPOTrainer with its defaults, `trl-best` with precomputed reference
log-probs and without checkpointing; both take only pairs.
"""

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from flax import nnx
from flax.traverse_util import flatten_dict
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.workload import full_rows_at_once
from sdpo_jax.data.tokens import Example
from sdpo_jax.models import lora as ours
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.store import load_model
from sdpo_jax.models.weights import slots

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def torch_model(folder: Path) -> torch.nn.Module:
    """transformers' model with the converted folder's weights and a PEFT adapter, float32."""
    model = load_model(folder, ours.LoraConfig(targets=()), dtype="float32")
    config = LlamaConfig(**json.loads((Path(folder) / "config.json").read_text()))
    theirs = LlamaForCausalLM(config)
    flat = flatten_dict(nnx.to_pure_dict(model.base), sep="/")
    state = {}
    for name, slot in slots(model.config).items():
        array = np.asarray(flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer])
        state[name] = torch.from_numpy(np.array(array.T if slot.transposed else array))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: {missing} {unexpected}")
    theirs.tie_weights()
    return adapted(theirs)


def random_model(config: DecoderConfig) -> torch.nn.Module:
    """transformers' Llama of this shape in bfloat16 with a float32 adapter; on a GPU if any."""
    theirs = LlamaConfig(
        vocab_size=config.V,
        num_hidden_layers=config.L,
        hidden_size=config.D,
        num_attention_heads=config.N,
        num_key_value_heads=config.G,
        head_dim=config.H,
        intermediate_size=config.F,
        max_position_embeddings=512,
        use_cache=False,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return adapted(LlamaForCausalLM._from_config(theirs, dtype=torch.bfloat16))


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the paper's PEFT adapter, without its dropout."""
    adapter = LoraConfig(
        r=8, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapter)


class OfficialSide:
    """The official recipe's step in plain PyTorch."""

    def __init__(self, model: torch.nn.Module, checkpointing: bool):
        self.model, self.checkpointing = model, checkpointing
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.parameters]

    def prepare(self, examples: Sequence[Example]) -> tuple[Callable[[], float], dict]:
        at_once = full_rows_at_once(len(examples), examples[0].C)
        parts = [examples[i : i + at_once] for i in range(0, len(examples), at_once)]
        batches = [padded_rows(part, self.model.device) for part in parts]
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.data.copy_(start)  # undo the steps of another K
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0)

        def backward(batch: dict) -> None:
            (self.loss(batch).sum() / len(examples)).backward()

        def run() -> float:
            self.set_checkpointing()  # another side may share the model
            started = time.perf_counter()
            for batch in batches:
                backward(batch)
            torch.nn.utils.clip_grad_norm_(self.parameters, 0.3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        self.model.eval()
        with torch.no_grad():
            logp_XC = np.concatenate([self.logp(batch).cpu().numpy() for batch in batches])
        self.set_checkpointing()
        # One counter per part, as a counter retains all that was computed under it.
        flops = sum(flops_of(functools.partial(backward, batch)) for batch in batches)
        optimizer.zero_grad(set_to_none=True)
        return run, {"examples_at_once": at_once, "flops": flops, "logp_XC": logp_XC}

    def loss(self, batch: dict) -> torch.Tensor:
        """S-DPO's loss [B] with its reference pass; with one answer SFT's."""
        if batch["shape"][1] == 1:
            return -self.logp(batch)[:, 0]
        with torch.no_grad(), self.model.disable_adapter():
            reference_BC = self.logp(batch)
        r_BC = self.logp(batch) - reference_BC
        return torch.logsumexp(r_BC, -1) - r_BC[:, 0]

    def set_checkpointing(self) -> None:
        self.model.train()
        if self.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        else:
            self.model.gradient_checkpointing_disable()

    def logp(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sequence log-probs [B, C] from logits at every position."""
        base = self.model.get_input_embeddings().weight
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype == torch.bfloat16):
            logits = self.model(batch["tokens"], attention_mask=batch["mask"]).logits.float()
        labels = batch["labels"][:, 1:]
        token_logp = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(0)[..., None])[..., 0]
        return (token_logp * (labels >= 0)).sum(-1).reshape(batch["shape"])


def padded_rows(examples: Sequence[Example], device: torch.device | str = "cpu") -> dict:
    """K+1 rows per prompt, padded on the right; labels are -1 except on answers."""
    rows = [
        (e.prompt[: place + 1], answer)
        for e in examples
        for place, answers in zip(e.places, e.answers_MC, strict=True)
        for answer in answers
    ]
    size = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, mask = np.zeros((len(rows), size), np.int64), np.zeros((len(rows), size), np.int64)
    labels = np.full((len(rows), size), -1, np.int64)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + len(answer)] = np.concatenate([prompt, answer])
        mask[i, : len(prompt) + len(answer)] = 1
        labels[i, len(prompt) : len(prompt) + len(answer)] = answer
    arrays = {"tokens": tokens, "mask": mask, "labels": labels}
    shape = (-1, examples[0].C)
    return {key: torch.from_numpy(x).to(device) for key, x in arrays.items()} | {"shape": shape}


class TrlSide:
    """One optimizer step of TRL's DPOTrainer, on pairs."""

    def __init__(self, model: torch.nn.Module, tokenizer, best: bool):
        self.model, self.tokenizer, self.best = model, tokenizer, best

    def prepare(self, examples: Sequence[Example]) -> tuple[Callable[[], float], dict]:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        decode = self.tokenizer.decode
        rows = [
            {
                "prompt": decode(e.prompt),
                "chosen": decode(e.answers_MC[0][0][:-1]),
                "rejected": decode(e.answers_MC[0][1][:-1]),
            }
            for e in examples
        ]
        flags = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            config = DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(examples),
                max_length=512,
                report_to=[],
                use_cpu=True,
                bf16=False,
                max_steps=1000,
                learning_rate=1e-5,
                beta=1.0,
                max_grad_norm=0.3,
                disable_tqdm=True,
                **(flags if self.best else {}),
            )
            trainer = DPOTrainer(
                model=self.model,
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer,
            )
        trainer.create_optimizer_and_scheduler(1000)
        trainer.current_gradient_accumulation_steps = 1  # normally set by the trainer's loop
        (batch,) = list(trainer.get_train_dataloader())

        def run() -> float:
            started = time.perf_counter()
            trainer.training_step(trainer.model, dict(batch))
            torch.nn.utils.clip_grad_norm_(
                [p for p in trainer.model.parameters() if p.requires_grad], 0.3
            )
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return time.perf_counter() - started

        return run, {"flops": flops_of(run)}


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products of a step, which also serves as the warm-up."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
