"""Every mistake of a caller: refused before any work, by a message that names the value and the limit.

Nothing is submitted, and the engine serves the next request. Values of `SamplingParams` and of the configuration
have their own tables in test_sampling_params.py and test_config.py; broken checkpoints in test_loader.py.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.cpu.model_helpers import edit_json, edited_tensors, make_checkpoint
from tests.cpu.tiny import CONFIG, make_llm, settle, write_config, write_model

P = SamplingParams
Call = Callable[[LLM], Any]
# Pools of 10 and 12 blocks of 16 tokens: 160 tokens fit the smaller; max_model_len is 256, or 100 where named.
BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "the prompt is empty: it has 0 tokens, at least 1 is needed"),
    ([], "the prompt is empty"),
    ((), "the prompt is empty"),
    (np.array([], dtype=np.int64), "the prompt is empty"),
    ([1.0], "token id 1.0 is not an integer"),
    ([1, 2.5], "token id 2.5 is not an integer"),
    ([1, None], "token id None is not an integer"),
    ([1, "a"], "token id 'a' is not an integer"),
    ([True], "token id True is not an integer"),
    ([np.float32(3)], "is not an integer"),
    (np.array([1.5]), "1.5) is not an integer"),
    (torch.tensor([0.5]), "is not an integer"),
    ([math.nan], "token id nan is not an integer"),
    ([-1], "token id -1 is outside the vocabulary of 320 ids (0 … 319)"),
    ([5, 320], "token id 320 is outside the vocabulary of 320 ids (0 … 319)"),
    ([10**30], f"token id {10**30} is outside the vocabulary of 320 ids"),
    (None, "a prompt must be a string or a list of token ids, got None"),
    (7, "a prompt must be a string or a list of token ids, got 7"),
    (1.5, "a prompt must be a string or a list of token ids, got 1.5"),
    (b"bytes", "a prompt must be a string or a list of token ids, got b'bytes'"),
    ({"prompt": "x"}, "a prompt must be a string or a list of token ids, got {'prompt': 'x'}"),
    (np.array(5), "a prompt must be a string or a list of token ids, got array(5)"),
    (torch.tensor(5), "a prompt must be a string or a list of token ids, got tensor(5)"),
    ("a\ud800", "the prompt is not valid Unicode"),
    ([1] * 256, "the prompt has 256 tokens; max_model_len=256 leaves none to generate"),
    ([1] * 10_000, "the prompt has 10000 tokens; max_model_len=256"),
    ("a" * 300, "the prompt has 300 tokens; max_model_len=256"),
    ([1] * 160, "the prompt has 160 tokens; the smaller KV pool holds 160"),
]
BAD_PARAMS: list[tuple[Any, Any, str]] = [
    ([1] * 100, P(max_tokens=157), "prompt of 100 tokens + max_tokens=157 = 257 is beyond max_model_len=256"),
    ([1] * 100, P(max_tokens=61), "prompt of 100 tokens + max_tokens=61 = 161 is beyond the smaller KV pool of 160"),
    ([1], P(max_tokens=2**31 - 1), "max_tokens=2147483647 = 2147483648 is beyond max_model_len=256"),
    ([1] * 100, P(max_tokens=None, min_tokens=61), "min_tokens=61 is more than the 60 that fit after this prompt"),
    ([1], P(stop_token_ids=[5, 320]), "stop_token_ids: 320 is outside the vocabulary of 320 ids"),
    ([1] * 96, P(n=7), "n=7 answers to a prompt of 96 tokens need 13 blocks at once; the pool has 12"),
    ([1], {"temperature": 0}, "sampling_params must be a SamplingParams or a list of them, got {'temperature': 0}"),
    ([1], 0.7, "sampling_params must be a SamplingParams or a list of them, got 0.7"),
    ([1], "greedy", "sampling_params must be a SamplingParams or a list of them, got 'greedy'"),
    ([1], [P(), 5], "sampling_params must be a SamplingParams or a list of them"),
    ([1], [], "0 sampling params for 1 prompts"),
    ([1], [P(), P()], "2 sampling params for 1 prompts"),
]
USER = {"role": "user", "content": "hi"}
BAD_CALLS: list[tuple[str, Call, str]] = [
    ("params-too-few", lambda llm: llm.generate(["a", "b"], [P()]), "1 sampling params for 2 prompts"),
    ("params-too-many", lambda llm: llm.generate(["a"], [P()] * 3), "3 sampling params for 1 prompts"),
    ("second-of-two", lambda llm: llm.generate([[1], [320]]), "token id 320"),
    ("params-of-second", lambda llm: llm.generate([[1], [2]], [P(), P(max_tokens=256)]), "max_tokens=256 = 257"),
    ("nested-too-deep", lambda llm: llm.generate([[[1]]]), "token id [1] is not an integer"),
    ("empty-among-others", lambda llm: llm.generate([[1], []]), "the prompt is empty"),
    ("mixed", lambda llm: llm.generate([[1], 5]), "token id [1] is not an integer"),
    ("list-to-stream", lambda llm: llm.stream(["a", "b"]), "token id 'a' is not an integer"),
    ("list-to-add", lambda llm: llm.add_request([[1], [2]]), "token id [1] is not an integer"),
    ("abort-int", lambda llm: llm.abort(7), "request_id must be a string, as add_request returns it, got 7"),
    ("abort-none", lambda llm: llm.abort(None), "request_id must be a string"),
    ("abort-list", lambda llm: llm.abort(["0"]), "request_id must be a string"),
    ("chat-text", lambda llm: llm.chat("hi"), "a conversation must be a list of messages with role and content"),
    ("chat-none", lambda llm: llm.chat(None), "a conversation must be a list of messages"),
    ("chat-int", lambda llm: llm.chat(5), "a conversation must be a list of messages with role and content, got 5"),
    ("chat-one-message", lambda llm: llm.chat(USER), "a conversation must be a list of messages"),
    ("chat-empty", lambda llm: llm.chat([]), "a conversation must be a list of messages"),
    ("chat-empty-inside", lambda llm: llm.chat([[USER], []]), "a conversation must be a list of messages"),
    ("chat-strings", lambda llm: llm.chat(["hi"]), "a conversation must be a list of messages"),
    ("chat-mixed", lambda llm: llm.chat([[USER], USER]), "a conversation must be a list of messages"),
    ("chat-kwargs", lambda llm: llm.chat([USER], chat_template_kwargs=5), "chat_template_kwargs must be a mapping"),
    ("chat-template-fails", lambda llm: llm.chat([USER], chat_template_kwargs={"tools": 5}), "chat template failed on"),
    ("chat-params", lambda llm: llm.chat([USER], [P()] * 2), "2 sampling params for 1 prompts"),
    ("chat-length", lambda llm: llm.chat([{**USER, "content": "a" * 400}]), "max_model_len=256"),
]
ENTRIES: list[tuple[str, Callable[..., Any]]] = [
    ("generate", lambda llm, prompt, params=None: llm.generate(prompt, params)),
    ("stream", lambda llm, prompt, params=None: llm.stream(prompt, params)),
    ("add_request", lambda llm, prompt, params=None: llm.add_request(prompt, params)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[False, True], ids=["inline", "overlap"])
def shared(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with make_llm(folder, enable_two_gpu_pd=True, num_kvcache_blocks=(10, 12), overlap=request.param) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """Whatever the test gets wrong: nothing was submitted, and the engine serves the next request."""
    work = shared.stats()["card0"]["prefill_tokens"]
    yield shared
    assert shared.stats()["card0"]["prefill_tokens"] == work and not shared._engine.has_unfinished()
    (output,) = shared.generate([1, 2, 3], P(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert len(output["token_ids"]) == 2
    settle(shared)


@pytest.fixture(autouse=True)
def no_progress_bar(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """What is refused does not even show a bar."""
    yield
    assert "Generating" not in capfd.readouterr().err


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=[message[:50] for _, message in BAD_PROMPTS])
@pytest.mark.parametrize("entry", [entry for _, entry in ENTRIES], ids=[name for name, _ in ENTRIES])
def test_bad_prompt(llm: LLM, entry: Callable[..., Any], prompt: Any, message: str) -> None:
    refused(lambda: entry(llm, prompt), message)


@pytest.mark.parametrize(("prompt", "params", "message"), BAD_PARAMS, ids=[m[:50] for _, _, m in BAD_PARAMS])
@pytest.mark.parametrize("entry", [entry for _, entry in ENTRIES], ids=[name for name, _ in ENTRIES])
def test_bad_params(llm: LLM, entry: Callable[..., Any], prompt: Any, params: Any, message: str) -> None:
    refused(lambda: entry(llm, prompt, params), message)


@pytest.mark.parametrize(("call", "message"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_bad_call(llm: LLM, call: Call, message: str) -> None:
    refused(lambda: call(llm), message)


def test_stream_is_refused_at_the_call_not_at_the_first_piece(llm: LLM) -> None:
    with pytest.raises(ValueError, match="token id 320"):
        llm.stream([320])


def test_long_values_are_not_repeated_at_length(llm: LLM) -> None:
    with pytest.raises(ValueError) as caught:
        llm.generate([1] * 100_000, use_tqdm=False)
    assert len(str(caught.value)) < 300


def test_unknown_keywords_of_methods_raise(llm: LLM) -> None:
    for method in (llm.generate, llm.stream, llm.add_request, llm.chat):
        with pytest.raises(TypeError, match="temperature"):
            method([1], temperature=0)


def test_the_callers_parameters_are_left_alone(llm: LLM) -> None:
    params = [P(max_tokens=1, ignore_eos=True), P(max_tokens=2, ignore_eos=True)]
    before = [repr(p) for p in params]
    with pytest.raises(ValueError):
        llm.generate([[1], [320]], params)
    assert [repr(p) for p in params] == before


# -- a folder without a tokenizer, or without a chat template


def test_folder_without_a_tokenizer_serves_ids_and_says_so_for_text(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path)) as llm:
        (output,) = llm.generate([1, 2], P(max_tokens=3, ignore_eos=True, stop_token_ids=[]), use_tqdm=False)
        assert len(output["token_ids"]) == 3
        pieces = list(llm.stream([1, 2], P(max_tokens=3, ignore_eos=True)))
        assert sum(len(piece.token_ids) for piece in pieces) == 3 and "".join(map(str, pieces)) == ""
        said = f"needs a tokenizer, and {tmp_path} has none"
        refused(lambda: output["text"], said)
        refused(lambda: output.outputs[0].text, said)
        refused(lambda: llm.generate("text"), said)
        refused(lambda: llm.stream("text"), said)
        refused(lambda: llm.chat([USER]), said)
        refused(lambda: llm.add_request([1], P(stop="x")), "stop=('x',) needs a tokenizer")
        assert "token_ids" in repr(output)


def test_folder_without_a_chat_template_says_so(tmp_path: Path) -> None:
    with make_llm(write_model(tmp_path, chat_template=False)) as llm:
        refused(lambda: llm.chat([USER]), f"the tokenizer in {tmp_path} has no chat template")
        assert llm.generate("a", P(max_tokens=1), use_tqdm=False)[0].finished


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 5}', "\x00"])
def test_broken_tokenizer_names_its_folder(tmp_path: Path, content: str) -> None:
    (write_model(tmp_path) / "tokenizer.json").write_text(content)
    refused(lambda: make_llm(tmp_path), f"the tokenizer in {tmp_path} cannot be loaded")


# -- checkpoints

BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type='llama' is not supported"),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures=['Qwen3MoeForCausalLM'] is not supported"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
    ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3' is not supported"),
    ({"hidden_size": None}, "key hidden_size is missing"),
    ({"head_dim": -16}, "head_dim=-16 must be positive"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "is not a multiple of"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=[message[:40] for _, message in BAD_CONFIGS])
def test_checkpoint_that_we_do_not_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(lambda: make_llm(write_config(tmp_path, **changes)), message)


def test_missing_folder() -> None:
    with pytest.raises(FileNotFoundError, match="/no/such/folder"):
        LLM("/no/such/folder")


@pytest.mark.parametrize("text", ["{", "", "[1]", '{"model_type": "qwen3",}'])
def test_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(lambda: make_llm(tmp_path), str(tmp_path / "config.json"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder)
    return folder


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_tensor(folder: Path) -> None:
    with edited_tensors(folder / "model.safetensors") as tensors:
        del tensors["model.layers.1.mlp.down_proj.weight"]


def change_shape(folder: Path) -> None:
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors["model.norm.weight"] = torch.ones(47)


def grow_the_model(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (truncate, ValueError, "model.safetensors is not a readable safetensors file (truncated"),
        (remove_weights, FileNotFoundError, "holds neither model.safetensors nor model.safetensors.index.json"),
        (remove_tensor, ValueError, "missing from the checkpoint: model.layers.1.mlp.down_proj.weight"),
        (change_shape, ValueError, "tensor model.norm.weight has shape [47], expected [48]"),
        (grow_the_model, ValueError, "missing from the checkpoint: model.layers.2."),
    ],
)
def test_damaged_checkpoint(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], kind: type[Exception], message: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    with make_llm(folder, load_format="auto") as llm:  # sound before
        assert llm.generate([1], P(max_tokens=1), use_tqdm=False)
    damage(folder)
    with pytest.raises(kind) as caught:
        make_llm(folder, load_format="auto")
    assert message in str(caught.value)


def test_revision_of_a_local_folder(tmp_path: Path) -> None:
    refused(lambda: make_llm(write_config(tmp_path), revision="main"), f"revision='main' has no meaning for {''}")


# -- without asserts

UNDER_O = """
import sys
from pathlib import Path
from nanovllm import LLM, SamplingParams
assert False, "asserts are on"  # gone under -O
folder = sys.argv[1]
options = dict(device="cpu", load_format="dummy", max_model_len=64, num_kvcache_blocks=(6, 4), kvcache_block_size=16)
llm = LLM(folder, enable_two_gpu_pd=True, **options)
P = SamplingParams
calls = [
    lambda: llm.generate([]), lambda: llm.generate([320]), lambda: llm.generate([-1]), lambda: llm.generate([1.5]),
    lambda: llm.generate([1] * 64), lambda: llm.generate([1], P(max_tokens=64)),
    lambda: llm.generate([[1], [2]], [P()]), lambda: llm.generate([1], P(n=5)), lambda: llm.add_request(None),
    lambda: llm.stream({}), lambda: llm.abort(1),
    lambda: llm.chat([]), lambda: llm.generate("text"), lambda: P(max_tokens=0), lambda: P(temperature=float("nan")),
    lambda: P(temperature=-1), lambda: P(top_p=0), lambda: P(n=0), lambda: P(min_tokens=-1), lambda: P(stop=""),
    lambda: P(presence_penalty=3), lambda: P(logprobs=-1), lambda: P(best_of=2), lambda: LLM(folder, device="tpu"),
    lambda: LLM(folder, tensor_parallel_size=2), lambda: LLM(folder, unknown=1), lambda: LLM("/no/such/folder"),
    lambda: LLM(folder, enable_two_gpu_pd=True, decode_device_id=0), lambda: LLM(folder, device="cpu"),
]
for number, call in enumerate(calls):
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        continue
    sys.exit(f"call {number} was accepted")
assert_free = llm.generate([[1, 2]] * 3, P(max_tokens=20, ignore_eos=True), use_tqdm=False)
llm.close()
print([len(output["token_ids"]) for output in assert_free])
"""


def test_nothing_depends_on_asserts(tmp_path: Path) -> None:
    """The last mistake on the list: `load_format` is "auto", and the folder has no weights."""
    write_config(tmp_path)
    command = [sys.executable, "-O", "-c", UNDER_O, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "[20, 20, 20]\n", "")


def test_the_tables_use_the_tiny_models_limits() -> None:
    assert CONFIG["vocab_size"] == 320
