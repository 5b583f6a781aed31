"""Every bad sampling parameter is refused by name, value and limit; good ones are stored normalised."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from nanovllm.sampling_params import UNSUPPORTED_PARAMETERS, SamplingParams

BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n must be in [1, 64], got 0"),
    ({"n": 65}, "n must be in [1, 64], got 65"),
    ({"n": True}, "n must be an integer, got True"),
    ({"n": 2.0}, "n must be an integer, got 2.0"),
    ({"n": None}, "n must be an integer, got None"),
    ({"n": 2, "temperature": 0}, "n must be 1 when greedy (temperature 0), got 2"),
    ({"n": 3, "temperature": 1e-6}, "n must be 1 when greedy (temperature 0), got 3"),
    ({"temperature": -0.1}, "temperature must be in [0, 1000.0], got -0.1"),
    ({"temperature": math.nan}, "temperature must be in [0, 1000.0], got nan"),
    ({"temperature": math.inf}, "temperature must be in [0, 1000.0], got inf"),
    ({"temperature": -math.inf}, "temperature must be in [0, 1000.0], got -inf"),
    ({"temperature": 1000.5}, "temperature must be in [0, 1000.0], got 1000.5"),
    ({"temperature": 10**400}, "temperature must be in [0, 1000.0], got 1000"),
    ({"temperature": "1"}, "temperature must be a number, got '1'"),
    ({"temperature": True}, "temperature must be a number, got True"),
    ({"temperature": None}, "temperature must be a number, got None"),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
    ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
    ({"top_p": -0.1}, "top_p must be in (0, 1], got -0.1"),
    ({"top_p": 1.01}, "top_p must be in (0, 1], got 1.01"),
    ({"top_p": math.nan}, "top_p must be in (0, 1], got nan"),
    ({"top_p": [0.5]}, "top_p must be a number, got [0.5]"),
    ({"top_k": -2}, "top_k must be in [-1, 2147483647], got -2"),
    ({"top_k": 2**31}, "top_k must be in [-1, 2147483647], got 2147483648"),
    ({"top_k": 1.5}, "top_k must be an integer, got 1.5"),
    ({"top_k": False}, "top_k must be an integer, got False"),
    ({"min_p": -0.01}, "min_p must be in [0, 1], got -0.01"),
    ({"min_p": 1.01}, "min_p must be in [0, 1], got 1.01"),
    ({"min_p": math.nan}, "min_p must be in [0, 1], got nan"),
    ({"seed": "7"}, "seed must be an integer, got '7'"),
    ({"seed": 1.0}, "seed must be an integer, got 1.0"),
    ({"seed": True}, "seed must be an integer, got True"),
    ({"seed": 2**63}, f"seed must be in [{-(2**63)}, {2**63 - 1}], got {2**63}"),
    ({"seed": -(2**63) - 1}, f"seed must be in [{-(2**63)}, {2**63 - 1}], got {-(2**63) - 1}"),
    ({"max_tokens": 0}, "max_tokens must be in [1, 2147483647], got 0"),
    ({"max_tokens": -5}, "max_tokens must be in [1, 2147483647], got -5"),
    ({"max_tokens": 8.0}, "max_tokens must be an integer, got 8.0"),
    ({"max_tokens": True}, "max_tokens must be an integer, got True"),
    ({"max_tokens": 2**31}, "max_tokens must be in [1, 2147483647], got 2147483648"),
    ({"min_tokens": -1}, "min_tokens must be in [0, 2147483647], got -1"),
    ({"min_tokens": None}, "min_tokens must be an integer, got None"),
    ({"min_tokens": 65}, "min_tokens must be at most max_tokens (64), got 65"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens (4), got 5"),
    ({"stop": ""}, "stop strings must have 1 to 256 characters, got 0: ''"),
    ({"stop": ["a", ""]}, "stop strings must have 1 to 256 characters, got 0: ''"),
    ({"stop": "x" * 257}, "stop strings must have 1 to 256 characters, got 257: 'xxx"),
    ({"stop": ["a"] * 17}, "stop must have at most 16 entries, got 17"),
    ({"stop": ["a", 3]}, "stop must hold strings, got 3"),
    ({"stop": b"abc"}, "stop must be a list or a tuple, got b'abc'"),
    ({"stop": {"a"}}, "stop must be a list or a tuple, got {'a'}"),
    ({"stop": 5}, "stop must be a list or a tuple, got 5"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list or a tuple, got 5"),
    ({"stop_token_ids": "12"}, "stop_token_ids must be a list or a tuple, got '12'"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids must have at most 64 entries, got 65"),
    ({"stop_token_ids": [1, "2"]}, "stop_token_ids must be an integer, got '2'"),
    ({"stop_token_ids": [1.0]}, "stop_token_ids must be an integer, got 1.0"),
    ({"stop_token_ids": [True]}, "stop_token_ids must be an integer, got True"),
    ({"stop_token_ids": [3, -1]}, "stop_token_ids must be in [0, 2147483647], got -1"),
    ({"presence_penalty": 2.1}, "presence_penalty must be in [-2.0, 2.0], got 2.1"),
    ({"presence_penalty": "0"}, "presence_penalty must be a number, got '0'"),
    ({"frequency_penalty": -2.1}, "frequency_penalty must be in [-2.0, 2.0], got -2.1"),
    ({"frequency_penalty": math.nan}, "frequency_penalty must be in [-2.0, 2.0], got nan"),
    ({"repetition_penalty": 0}, "repetition_penalty must be in [0.01, 10.0], got 0"),
    ({"repetition_penalty": -1.0}, "repetition_penalty must be in [0.01, 10.0], got -1.0"),
    ({"repetition_penalty": 10.5}, "repetition_penalty must be in [0.01, 10.0], got 10.5"),
    ({"repetition_penalty": math.inf}, "repetition_penalty must be in [0.01, 10.0], got inf"),
    ({"logprobs": -1}, "logprobs must be in [0, 20], got -1"),
    ({"logprobs": 21}, "logprobs must be in [0, 20], got 21"),
    ({"logprobs": True}, "logprobs must be an integer, got True"),
    ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
    ({"skip_special_tokens": None}, "skip_special_tokens must be True or False, got None"),
    ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output must be True or False, got 'no'"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=[str(kwargs)[:60] for kwargs, _ in BAD])
def test_bad_value_is_refused_by_name_value_and_limit(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        SamplingParams(**kwargs)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_PARAMETERS))
def test_parameter_of_vllm_that_we_lack_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is not supported$"):
        SamplingParams(temperature=0.5, **{name: None})


def test_unsupported_names_are_not_fields() -> None:
    assert not UNSUPPORTED_PARAMETERS & {field.name for field in dataclasses.fields(SamplingParams)}


def test_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n": 64},
        {"temperature": 1000},
        {"temperature": 1e-5},
        {"top_p": 1e-9},
        {"top_k": 2**31 - 1},
        {"min_p": 1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": 1},
        {"max_tokens": None, "min_tokens": 10**6},
        {"min_tokens": 64},
        {"stop": ["x" * 256] * 16},
        {"stop_token_ids": [2**31 - 1] * 64},
        {"presence_penalty": 2, "frequency_penalty": -2},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 10},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
    ids=str,
)
def test_values_at_the_limits_are_kept(kwargs: dict[str, Any]) -> None:
    params = SamplingParams(**kwargs)
    for name, value in kwargs.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.seed, params.max_tokens, params.min_tokens, params.logprobs) == (None, 64, 0, None)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == ((), (), False)
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (True, False)
    assert not params.is_greedy and not params.has_penalty


def test_positional_order_is_that_of_vllm() -> None:
    params = SamplingParams(2, 0.1, 0.2, 1.3, 0.4, 0.5, 6, 0.7, 8, "stop", [9], True, 10, 5, 3)
    expected = {
        "n": 2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.3,
        "temperature": 0.4,
        "top_p": 0.5,
        "top_k": 6,
        "min_p": 0.7,
        "seed": 8,
        "stop": ("stop",),
        "stop_token_ids": (9,),
        "ignore_eos": True,
        "max_tokens": 10,
        "min_tokens": 5,
        "logprobs": 3,
    }
    assert params == SamplingParams(**expected)


@pytest.mark.parametrize("temperature", [0, 0.0, -0.0, 9e-6])
def test_temperatures_below_the_bound_are_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    assert params.is_greedy and math.copysign(1, params.temperature) == 1 and params.temperature == 0


def test_smallest_random_temperature_is_random() -> None:
    assert not SamplingParams(temperature=1e-5).is_greedy


def test_top_k_off_is_zero_either_way() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_each_penalty_counts_as_one(name: str) -> None:
    assert SamplingParams(**{name: 0.5}).has_penalty


def test_numpy_scalars_become_plain_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(5), stop_token_ids=[np.int32(7)])
    assert type(params.temperature) is float and type(params.top_k) is int
    assert type(params.stop_token_ids[0]) is int


def test_frozen() -> None:
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.0  # type: ignore[misc]


def test_lists_of_the_caller_are_copied_and_left_alone() -> None:
    stop, ids = ["a", "b"], [1, 2]
    params = SamplingParams(stop=stop, stop_token_ids=ids)
    assert (stop, ids) == (["a", "b"], [1, 2])
    stop.append("c")
    ids[0] = 9
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))


def test_hashable_copyable_replaceable() -> None:
    params = SamplingParams(temperature=0.3, stop=["a"], seed=5)
    assert len({params, copy.deepcopy(params), copy.copy(params), pickle.loads(pickle.dumps(params))}) == 1
    assert dataclasses.replace(params, seed=6).seed == 6
    with pytest.raises(ValueError, match="^top_p must be in"):
        dataclasses.replace(params, top_p=2)


def test_module_does_not_import_torch() -> None:
    path = sys.modules[SamplingParams.__module__].__file__
    code = f"import runpy, sys; runpy.run_path({path!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
