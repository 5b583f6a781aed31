"""Train the demo checkpoint that ships in `nanovllm/demo`: a 3.4 M parameter Qwen3 that writes Python.

The model and its byte-level BPE tokenizer are trained from scratch on the `.py` files of a Python standard
library: mostly whole files, and one row in ten of chats made from documented functions (the user asks for
a function by its docstring, the assistant answers with its code). The folder it writes is laid out like a
published Qwen3 checkpoint, so the engine and `transformers` load it unchanged.

    python tools/train_demo_model.py --out nanovllm/demo --minutes 3 --device cuda
    python tools/train_demo_model.py --out demo-smoke --steps 4 --batch 2 --device cpu   # a smoke run

Needs torch, transformers and tokenizers. The learning rate follows the share of the budget that is used up
(of the steps, or of the minutes), so a time-boxed run also ends its cosine. The checkpoint is saved at each
evaluation; evaluation reads the saved folder, that is the weights rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import textwrap
import time
import tokenize
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

# Shape suffixes: B rows of a batch, T tokens of a row, N tokens of a stream, S starts in it.

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The model has a few more logits than the tokenizer has tokens, as the published Qwen3 checkpoints do.
NUM_TOKENS, NUM_LOGITS = 4080, 4096
MAX_LENGTH_TOKENS, SHORT_LENGTH_TOKENS = 4096, 1024
LONG_PHASE = 0.15  # the last share of the budget, trained on rows of MAX_LENGTH_TOKENS
CHAT_SHARE, HELD_OUT_SHARE = 0.1, 0.03
# Other installers' code, tables, prose, and old code kept as test data.
EXCLUDED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3/tests/data"}

# Splits text as Qwen's own tokenizer does: contractions, words, digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# While merges are learned, punctuation and the line end behind it are apart, so no token holds both. Else a
# prompt such as "def f(x):" would end in a token that the model knows only without a line end behind it.
LEARNING_SPLIT = SPLIT.replace("+[\\r\\n]*|", "+|")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
REQUESTS = (
    "Write a Python {kind} named {name}. {summary}",
    "Write a Python {kind}. {summary}",
    "Implement {name}({arguments}): {summary}",
)
PROMPTS = ("def fibonacci(n):", "import os", "class Stack:", "def read_lines(path):", "for i in range(10):")
CHAT_PROMPT = "Write a Python function named join_paths. Join two path components."


@dataclass(frozen=True)
class Corpus:
    """Token streams on the training device, int64, and the indices at which rows may begin."""

    code_N: Tensor
    code_starts_S: Tensor  # where an unindented line begins
    chat_N: Tensor
    chat_starts_S: Tensor  # where a conversation begins
    held_out_N: Tensor


def read_sources(root: Path) -> list[str]:
    """The texts of all parseable `.py` files below `root`, in path order, without EXCLUDED."""
    texts = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if path.name.startswith("_sysconfigdata") or any(f"{name}/" in relative for name in EXCLUDED):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
            ast.parse(text)
        except (SyntaxError, ValueError):  # UnicodeDecodeError is a ValueError
            continue
        if text.strip():
            texts.append(text)
    return texts


def conversations(text: str, rng: random.Random) -> list[list[dict[str, str]]]:
    """One request and answer for each short documented function of a file."""
    lines, chats = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not ast.get_docstring(node):
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())[:200]
        names = [argument.arg for argument in node.args.args]
        kind = "method" if names[:1] in (["self"], ["cls"]) else "function"
        words = {"kind": kind, "name": node.name, "summary": summary, "arguments": ", ".join(names)}
        request = rng.choice(REQUESTS).format(**words)
        if len(code) <= 1500:
            chats.append([{"role": "user", "content": request}, {"role": "assistant", "content": code}])
    return chats


def splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])


def train_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerBase:
    """Train the BPE, write `tokenizer.json` and `tokenizer_config.json`, and load them back."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    bpe.pre_tokenizer = splitter(LEARNING_SPLIT)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NUM_TOKENS - 3, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = splitter(SPLIT)
    bpe.add_special_tokens([END_OF_TEXT, IM_START, IM_END])  # behind the vocabulary, as in Qwen3
    bpe.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": None, "eos_token": IM_END, "pad_token": END_OF_TEXT, "unk_token": None}
    flags = {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "split_special_tokens": False}
    settings = tokens | flags
    settings["additional_special_tokens"] = [IM_START, IM_END]
    settings["chat_template"], settings["errors"] = CHAT_TEMPLATE, "replace"
    settings["model_max_length"], settings["tokenizer_class"] = MAX_LENGTH_TOKENS, "Qwen2Tokenizer"
    write_json(folder / "tokenizer_config.json", settings)
    return AutoTokenizer.from_pretrained(folder)


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def model_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """`config.json` in the style of the published Qwen3 checkpoints."""
    names = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": NUM_LOGITS}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "attention_bias": False}
    window = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 6}
    rope = {"max_position_embeddings": MAX_LENGTH_TOKENS, "rope_theta": 1000000, "rope_scaling": None}
    numbers = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": True}
    weights = {"torch_dtype": "bfloat16", "tie_word_embeddings": True}
    end, im_end = (tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TEXT, IM_END))
    tokens = {"bos_token_id": end, "eos_token_id": im_end}
    return names | shape | attention | window | rope | numbers | weights | tokens


def save_checkpoint(model: Qwen3ForCausalLM, settings: dict[str, object], folder: Path) -> None:
    """Write the weights, rounded to bfloat16 and without the tied `lm_head`, and the two configurations."""
    weights = {name: weight.detach().bfloat16().cpu() for name, weight in model.state_dict().items()}
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", settings)
    end, im_end = settings["bos_token_id"], settings["eos_token_id"]
    generation = {"bos_token_id": end, "eos_token_id": [im_end, end], "pad_token_id": end}
    write_json(folder / "generation_config.json", generation)


def unindented_lines(tokenizer: PreTrainedTokenizerBase, code_N: Tensor) -> Tensor:
    """Indices into `code_N` of the tokens that begin a line without indentation, int64 [S]."""
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    line_ends = torch.tensor([piece.endswith("\n") for piece in pieces], device=code_N.device)
    unindented = torch.tensor([not piece[:1].isspace() for piece in pieces], device=code_N.device)
    return 1 + (line_ends[code_N[:-1]] & unindented[code_N[1:]]).nonzero().flatten()


def prepare_corpus(root: Path, folder: Path, seed: int, device: str) -> tuple[Corpus, PreTrainedTokenizerBase]:
    """Read, split by file, train the tokenizer on the training files, and tokenise."""
    rng = random.Random(seed)
    texts = read_sources(root)
    rng.shuffle(texts)
    num_held_out = max(1, int(HELD_OUT_SHARE * len(texts)))
    held_out, training = texts[:num_held_out], texts[num_held_out:]
    tokenizer = train_tokenizer(training, folder)
    pairs = [chat for text in training for chat in conversations(text, rng)]
    rng.shuffle(pairs)
    chats = [tokenizer.apply_chat_template(pair, tokenize=False) for pair in pairs]

    def stream(documents: list[str]) -> Tensor:
        ids = tokenizer([document + END_OF_TEXT for document in documents], verbose=False)["input_ids"]
        return torch.tensor(list(chain.from_iterable(ids)), device=device)

    code_N, chat_N = stream(training), stream(chats)
    chat_starts_S = 1 + (chat_N[:-1] == tokenizer.convert_tokens_to_ids(END_OF_TEXT)).nonzero().flatten()
    corpus = Corpus(code_N, unindented_lines(tokenizer, code_N), chat_N, chat_starts_S, stream(held_out))
    if len(corpus.held_out_N) <= MAX_LENGTH_TOKENS:
        raise ValueError(f"{root}: {len(corpus.held_out_N)} held-out tokens, need over {MAX_LENGTH_TOKENS}")
    print(
        f"{len(texts)} files, {num_held_out} of them held out; tokens: {len(corpus.code_N):,} code, "
        f"{len(corpus.chat_N):,} in {len(chats):,} chats, {len(corpus.held_out_N):,} held out; "
        f"{sum(len(text.encode()) for text in held_out) / len(corpus.held_out_N):.2f} bytes a held-out token",
        flush=True,
    )
    return corpus, tokenizer


def next_rows(corpus: Corpus, batch: int, length: int) -> Tensor:
    """As many random rows of `length` + 1 tokens as make `batch` rows of SHORT_LENGTH_TOKENS, int64.

    One in ten begins where a conversation does, the others one half at an unindented line, as prompts do,
    and one half anywhere, so that the middle of a long class is seen too. Streams wrap around.
    """
    batch = max(1, batch * SHORT_LENGTH_TOKENS // length)
    num_chat = round(CHAT_SHARE * batch)
    num_lines = (batch - num_chat) // 2
    device = corpus.code_N.device

    def picks(limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count, 1), device=device)

    steps_T = torch.arange(length + 1, device=device)
    lines_B = corpus.code_starts_S[picks(len(corpus.code_starts_S), num_lines)]
    starts_B = torch.cat([lines_B, picks(len(corpus.code_N), batch - num_chat - num_lines)])
    chat_starts_B = corpus.chat_starts_S[picks(len(corpus.chat_starts_S), num_chat)]
    code_BT = corpus.code_N[(starts_B + steps_T) % len(corpus.code_N)]
    return torch.cat([code_BT, corpus.chat_N[(chat_starts_B + steps_T) % len(corpus.chat_N)]])


def row_loss(model: nn.Module, rows_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each row's next tokens, float32 scalar.

    The empty mask entry says "causal" without materialising a mask, so that sdpa picks its flash kernel.
    """
    logits = model(rows_BT[:, :-1], attention_mask={"full_attention": None}, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows_BT[:, 1:].flatten())


def gradient_step(loss_function: Callable[..., Tensor], model: nn.Module, rows_BT: Tensor) -> Tensor:
    """Leave the clipped gradients of one batch in `model`; returns the detached loss."""
    with torch.autocast(rows_BT.device.type, torch.bfloat16):
        loss = loss_function(model, rows_BT)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.detach()


@torch.inference_mode()
def saved_loss(folder: Path, stream_N: Tensor, length: int) -> float:
    """Loss in nats a token of the checkpoint in `folder`, computed in float32, on rows of `length` tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(stream_N.device)
    rows = stream_N[: len(stream_N) // (length + 1) * (length + 1)].view(-1, length + 1)
    losses = [(row_loss(model, chunk).item(), len(chunk)) for chunk in rows.split(max(1, 16384 // length))]
    return sum(loss * count for loss, count in losses) / len(rows)


def add_dropout(model: Qwen3ForCausalLM, rate: float) -> None:
    """Drop out what attention and MLP add to the residual stream, while training only."""
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp):
            module.register_forward_hook(lambda module, _, output: F.dropout(output, rate, module.training))


def make_optimizer(model: nn.Module, decay: float, device: str) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device == "cuda")


def learning_rate(used: float, peak: float) -> float:
    """Linear warm-up over the first 2 % of the budget, then a cosine to 1 % of the peak. `used` in [0, 1]."""
    return peak * min(1.0, used / 0.02 + 0.01) * (0.01 + 0.99 * (1 + math.cos(math.pi * used)) / 2)


def train(args: argparse.Namespace, corpus: Corpus, settings: dict[str, object]) -> None:
    """Train until the budget is used up, saving and evaluating every `args.eval_seconds`."""
    model = Qwen3ForCausalLM(Qwen3Config(**settings, attn_implementation="sdpa")).float().to(args.device)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    if args.dropout:
        add_dropout(model, args.dropout)
    optimizer = make_optimizer(model, args.weight_decay, args.device)
    loss_function = row_loss
    if args.device == "cuda":
        loss_function = torch.compile(row_loss, dynamic=False)
        for length in (SHORT_LENGTH_TOKENS, MAX_LENGTH_TOKENS):  # compile both shapes before the clock starts
            gradient_step(loss_function, model, next_rows(corpus, args.batch, length))
        optimizer.zero_grad(set_to_none=True)
    step, num_tokens, recent, used = 0, 0, [], 0.0
    started = last_saved = time.monotonic()
    while used < 1:
        length = MAX_LENGTH_TOKENS if used > 1 - LONG_PHASE else SHORT_LENGTH_TOKENS
        rows = next_rows(corpus, args.batch, length)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(used, args.lr)
        loss = gradient_step(loss_function, model, rows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, num_tokens = step + 1, num_tokens + rows.shape[0] * length
        recent = [*recent[-99:], loss]
        if step % 20 == 0:
            loss.item()  # keeps the host at most 20 steps ahead of the device, so that the clock is true
        seconds = time.monotonic() - started
        used = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if used >= 1 or time.monotonic() - last_saved > args.eval_seconds:
            last_saved = time.monotonic()
            save_checkpoint(model, settings, args.out)
            print(
                f"step {step:6d}  {seconds:5.0f} s  {num_tokens / 1e6:7.1f} M tokens of {length}  "
                f"train {torch.stack(recent).mean().item():.4f}  "
                f"held out {saved_loss(args.out, corpus.held_out_N, SHORT_LENGTH_TOKENS):.4f}",
                flush=True,
            )


@torch.inference_mode()
def report(folder: Path, corpus: Corpus, device: str, new_tokens: int) -> None:
    """Print the final losses and greedy continuations of the saved checkpoint."""
    for length in (SHORT_LENGTH_TOKENS, MAX_LENGTH_TOKENS):
        held_out = saved_loss(folder, corpus.held_out_N, length)
        training = saved_loss(folder, corpus.code_N[: len(corpus.held_out_N)], length)
        print(f"bfloat16, context {length}: held out {held_out:.4f}, training files {training:.4f}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    request = [{"role": "user", "content": CHAT_PROMPT}]
    chat = tokenizer.apply_chat_template(request, tokenize=False, add_generation_prompt=True)
    for prompt in (*PROMPTS, chat):
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        print(f"--------\n{tokenizer.decode(output[0])}", flush=True)


def parse_args() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="train for so long")
    budget.add_argument("--steps", type=int, help="train for so many steps")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seed", type=int, default=0)
    stdlib = Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--source", type=Path, default=stdlib, help="folder of `.py` files")
    parser.add_argument("--batch", type=int, default=64, help="rows of 1024 tokens in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--eval-seconds", type=float, default=60.0)
    parser.add_argument("--new-tokens", type=int, default=120, help="length of the printed continuations")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # of the sources that are parsed
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="TensorFloat32")  # evaluation is float32 on purpose
    torch.manual_seed(args.seed)
    disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer = prepare_corpus(args.source, args.out, args.seed, args.device)
    train(args, corpus, model_settings(tokenizer))
    report(args.out, corpus, args.device, args.new_tokens)


if __name__ == "__main__":
    main()
