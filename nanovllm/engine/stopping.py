"""Whether a sequence that just grew is over, and why. Imports no torch."""

from __future__ import annotations

from nanovllm.engine.sequence import Sequence


def stop_of(sequence: Sequence) -> tuple[str | None, int | str | None]:
    """(finish reason, stop reason) of a sequence that just grew, (None, None) if it goes on; vLLM's order of checks."""
    request, params, token = sequence.request, sequence.request.params, sequence.tokens[-1]
    past_minimum = sequence.num_output_tokens >= params.min_tokens
    if past_minimum and token in request.eos_token_ids:
        return _by_id(sequence, token, None)
    if past_minimum and token in request.stop_token_ids:
        return _by_id(sequence, token, token)
    if sequence.watcher is not None:
        # The text of the first min_tokens tokens may contain a stop string, what comes after may not.
        found = sequence.watcher.push(token, search=sequence.num_output_tokens > params.min_tokens)
        if found is not None:
            return "stop", found
    return ("length", None) if sequence.num_output_tokens >= request.max_tokens else (None, None)


def _by_id(sequence: Sequence, token: int, stop_reason: int | None) -> tuple[str, int | None]:
    if sequence.watcher is not None and sequence.request.params.include_stop_str_in_output:
        sequence.watcher.push(token, search=False)
    return "stop", stop_reason
