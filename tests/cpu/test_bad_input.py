"""Every mistake of a caller: refused before any work, by a message that names the value and the limit.

Nothing is submitted, and the engine serves the next request. The tables are in bad_inputs.py; values of
`SamplingParams` and of the configuration have theirs in test_sampling_params.py and test_config.py; checkpoints in
bad_checkpoints.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.cpu.bad_inputs import (
    BAD_CALLS,
    BAD_PARAMS,
    BAD_PROMPTS,
    CASES,
    ENTRIES,
    LONGEST_MESSAGE,
    USER,
    Call,
    Case,
    complaint,
    start,
)
from tests.cpu.model_helpers import edit_json, edited_tensors, make_checkpoint
from tests.cpu.tiny import CONFIG, make_llm, settle, write_config, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[False, True], ids=["inline", "overlap"])
def shared(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with start(folder, overlap=request.param) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """Whatever the test gets wrong: nothing was submitted, and the engine serves the next request."""
    work = shared.stats()["card0"]["prefill_tokens"]
    yield shared
    assert shared.stats()["card0"]["prefill_tokens"] == work and not shared._engine.has_unfinished()
    (output,) = shared.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
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
    assert message in str(caught.value) and len(str(caught.value)) < LONGEST_MESSAGE


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
    params = [SamplingParams(max_tokens=1, ignore_eos=True), SamplingParams(max_tokens=2, ignore_eos=True)]
    before = [repr(p) for p in params]
    with pytest.raises(ValueError):
        llm.generate([[1], [320]], params)
    assert [repr(p) for p in params] == before


# -- a folder without a tokenizer, or without a chat template


def test_folder_without_a_tokenizer_serves_ids_and_says_so_for_text(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path)) as llm:
        (output,) = llm.generate(
            [1, 2], SamplingParams(max_tokens=3, ignore_eos=True, stop_token_ids=[]), use_tqdm=False
        )
        assert len(output["token_ids"]) == 3
        pieces = list(llm.stream([1, 2], SamplingParams(max_tokens=3, ignore_eos=True)))
        assert sum(len(piece.token_ids) for piece in pieces) == 3 and "".join(map(str, pieces)) == ""
        said = f"needs a tokenizer, and {tmp_path} has none"
        refused(lambda: output["text"], said)
        refused(lambda: output.outputs[0].text, said)
        refused(lambda: llm.generate("text"), said)
        refused(lambda: llm.stream("text"), said)
        refused(lambda: llm.chat([USER]), said)
        refused(lambda: llm.add_request([1], SamplingParams(stop="x")), "stop=('x',) needs a tokenizer")
        assert "token_ids" in repr(output)


def test_folder_without_a_chat_template_says_so(tmp_path: Path) -> None:
    with make_llm(write_model(tmp_path, chat_template=False)) as llm:
        refused(lambda: llm.chat([USER]), f"the tokenizer in {tmp_path} has no chat template")
        assert llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)[0].finished


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
        assert llm.generate([1], SamplingParams(max_tokens=1), use_tqdm=False)
    damage(folder)
    with pytest.raises(kind) as caught:
        make_llm(folder, load_format="auto")
    assert message in str(caught.value)


def test_revision_of_a_local_folder(tmp_path: Path) -> None:
    refused(lambda: make_llm(write_config(tmp_path), revision="main"), f"revision='main' has no meaning for {''}")


# -- without asserts


def test_nothing_depends_on_asserts() -> None:
    """Every mistake of every table once more, in a process without asserts."""
    command = [sys.executable, "-O", "-m", "tests.cpu.bad_inputs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, f"{len(CASES)} refused\n"), done.stdout + done.stderr


def test_they_are_many_and_different() -> None:
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)


def test_the_table_itself_notices(shared: LLM) -> None:
    """What is accepted, says something else, at length or by another error, is a complaint."""
    assert complaint(Case("a", lambda llm: None, ""), shared) == "a: accepted"
    assert "does not say" in str(complaint(Case("a", lambda llm: llm.generate([320]), "token id 321"), shared))
    assert "ZeroDivisionError" in str(complaint(Case("a", lambda llm: 1 // 0, ""), shared))

    def at_length(llm: LLM) -> None:
        raise ValueError("x" * 5000)

    assert complaint(Case("a", at_length, "xxx"), shared) == "a: 5000 characters"


def test_the_tables_use_the_tiny_models_limits() -> None:
    assert CONFIG["vocab_size"] == 320
