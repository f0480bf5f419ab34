"""Continue a batch of prompts token by token with a key-value cache: numpy alone.

    prompts -> rows without padding -> one step over the padded prompts -> one step a token, until every row has ended

Of an encoder-decoder, what is given is read by the encoder once, and the tokens are the decoder's: `decoder_input_ids`, or
those that the model begins with.

Padding is put on the right, wherever the caller had it. A row that has ended is computed along with the others and written
over at its own place in the cache, so that it needs no place more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tilecut_runtime.errors import InputError
from tilecut_runtime.onnx_decoder import OnnxDecoder
from tilecut_runtime.openvino_decoder import OpenVinoDecoder
from tilecut_runtime.read_source import read_source, reads_ids
from tilecut_runtime.sample_tokens import Sampling, is_count
from tilecut_runtime.stream_text import StreamText, can_tell, open_tokenizer
from tilecut_runtime.token_rows import rows_of

if TYPE_CHECKING:
    from tilecut_runtime.session import Session

WHERE = "Session.generate"
Decoder = OnnxDecoder | OpenVinoDecoder
EOS, STOP, LENGTH = "eos", "stop", "length"
OPTIONS = ("decoder_input_ids", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "eos", "seed")


@dataclass(frozen=True)
class Step:
    """One token of every row.

    Attributes:
        tokens: the new token; None of a row that had ended before.
        texts: the new text, where prompts are texts; it may lag behind the tokens.
        reasons: why a row ended with this token: "eos", "stop" or "length"; None where it did not end.
    """

    tokens: tuple[int | None, ...]
    texts: tuple[str, ...] | None
    reasons: tuple[str | None, ...]


@dataclass
class Generated:
    """What rows were continued with.

    Attributes:
        tokens: the new ids of every row, the one that ended it included.
        texts: the new texts, where prompts are texts or no tokens at all, without what ended them.
        reasons: why each row ended: "eos", "stop" or "length".
    """

    tokens: list[list[int]]
    texts: list[str] | None
    reasons: list[str]


@dataclass
class Request:
    """Checked prompts and options; `encoded` is what an encoder made of what was given."""

    prompts: list[np.ndarray]
    max_new_tokens: int
    sampling: Sampling
    eos: frozenset[int]
    stop_ids: frozenset[int]
    writers: list[StreamText] = field(default_factory=list)
    tell: bool = False
    encoded: dict[str, np.ndarray] | None = None


def request_of(
    session: Session,
    input_ids: Any,
    attention_mask: Any,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    stop: Any,
    eos: Any,
    seed: int | None,
    decoder_input_ids: Any,
    unknown: Mapping[str, Any],
) -> Request:
    """What `Session.generate` was asked for.

    Raises:
        InputError: the first thing that does not fit.
    """
    decoder = session.decoder
    if unknown:
        raise InputError(WHERE, "unknown argument", got=next(iter(unknown)), wanted=", ".join(OPTIONS))
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    if not is_count(max_new_tokens) or not max_new_tokens:
        raise InputError(WHERE, "max_new_tokens does not fit", got=repr(max_new_tokens), wanted="a positive integer")
    stops = _listed(stop)
    if bad := [one for one in stops if not is_count(one) and (not isinstance(one, str) or not one)]:
        raise InputError(WHERE, "stop does not fit", got=repr(bad[0]), wanted="token ids and strings")
    ends = decoder.layout.eos if eos is None else tuple(_listed(eos))
    if bad := [one for one in ends if not is_count(one)]:
        raise InputError(WHERE, "eos does not fit", got=repr(bad[0]), wanted="token ids")
    strings = [one for one in stops if isinstance(one, str)]
    texts = [input_ids] if isinstance(input_ids, str) else input_ids
    said = isinstance(texts, list | tuple) and bool(texts) and all(isinstance(text, str) for text in texts)
    # What is heard or seen is told as text where it can be.
    tell = said or (session.manifest.encoder is not None and not reads_ids(session.encoder) and can_tell(session.manifest))
    tokenizer = None
    if strings or tell:
        what = f"stop holds the string {strings[0]!r}" if strings and not said else "the prompts are texts"
        tokenizer = open_tokenizer(session.path, session.manifest, what)
    if said:
        assert tokenizer is not None
        if attention_mask is not None:
            raise InputError(WHERE, "texts need no attention_mask", fix="leave it out")
        prompts = [np.array(one.ids, np.int64) for one in tokenizer.encode_batch(list(texts))]
    elif session.manifest.encoder is None:
        prompts = rows_of(input_ids, attention_mask)
    else:
        prompts = []
    encoded = None
    if session.manifest.encoder is not None:
        encoded = read_source(session.encoder, prompts if said else input_ids, attention_mask)
        prompts = _decoder_prompts(decoder, decoder_input_ids, len(next(iter(encoded.values()))))
    elif decoder_input_ids is not None:
        raise InputError(WHERE, "the model has no encoder", got="decoder_input_ids", wanted="input_ids alone")
    _check_prompts(prompts, decoder)
    writers = [StreamText(tokenizer, [int(t) for t in prompt], strings) for prompt in prompts] if tokenizer else []
    return Request(
        prompts,
        int(max_new_tokens),
        sampling,
        frozenset(map(int, ends)),
        frozenset(int(one) for one in stops if not isinstance(one, str)),
        writers,
        tell,
        encoded,
    )


def _decoder_prompts(decoder: Decoder, given: Any, rows: int) -> list[np.ndarray]:
    """The ids that the decoder of `rows` texts begins with: those given, or the model's own."""
    if given is None:
        if not decoder.layout.start:
            raise InputError(WHERE, "the model names no id that its decoder begins with", fix="give decoder_input_ids")
        return [np.array(decoder.layout.start, np.int64)] * rows
    prompts = rows_of(given, None, "decoder_input_ids")
    if len(prompts) == 1:
        prompts *= rows
    if len(prompts) != rows:
        raise InputError(
            WHERE, "decoder_input_ids has other rows than the input", got=len(prompts), wanted=f"{rows}, or one for all"
        )
    return prompts


def _listed(given: Any) -> list[Any]:
    """One thing or several, as a list; None is nothing."""
    if given is None:
        return []
    if isinstance(given, np.ndarray):
        return given.reshape(-1).tolist()
    return (
        list(given)
        if isinstance(given, Sequence | set | frozenset) and not isinstance(given, str | bytes)
        else [given]
    )


def _check_prompts(prompts: Sequence[np.ndarray], decoder: Decoder) -> None:
    if not prompts:
        raise InputError(WHERE, "there is no prompt", wanted="one row at least")
    most = decoder.layout.max_length
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(
                WHERE,
                f"row {row} is an empty prompt",
                wanted="one token at least",
                fix="begin with the model's bos token",
            )
        if len(prompt) > most:
            raise InputError(
                WHERE, f"row {row} is longer than the model's positions", got=len(prompt), wanted=f"at most {most}"
            )
        if prompt.min() < 0 or prompt.max() >= decoder.vocabulary:
            odd = prompt.min() if prompt.min() < 0 else prompt.max()
            raise InputError(
                WHERE, f"row {row} holds an unknown token id", got=int(odd), wanted=f"0 to {decoder.vocabulary - 1}"
            )


def steps_of(decoder: Decoder, request: Request) -> Iterator[Step]:
    """One `Step` for every token of the longest row."""
    prompts, most = request.prompts, decoder.layout.max_length
    rows = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    # The last token that is chosen is never read.
    decoding = decoder.start(rows, min(int(lengths.max()) + request.max_new_tokens - 1, most), request.encoded)
    # The token behind the last position is chosen, and read by nothing.
    held = [np.zeros(min(len(prompt) + request.max_new_tokens, most + 1), np.int64) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        held[row][: len(prompt)] = prompt
    tokens = np.zeros((rows, int(lengths.max())), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    draws, running = request.sampling.draws(rows), [True] * rows
    counts = lengths.copy()
    while any(running):
        logits = decoding.step(tokens, lengths)
        chosen: list[int | None] = [None] * rows
        reasons: list[str | None] = [None] * rows
        texts = [""] * rows
        for row in range(rows):
            if not running[row]:
                continue
            token = request.sampling.choose(logits[row], held[row][: counts[row]], draws[row])
            chosen[row], held[row][counts[row]] = token, token
            counts[row] += 1
            reasons[row], texts[row] = _end(request, row, token, int(counts[row]), most)
            running[row] = reasons[row] is None
        yield Step(tuple(chosen), tuple(texts) if request.tell else None, tuple(reasons))
        # A row that ended stays where it is: its last token is written again and again.
        decoding.accept(np.where(running, lengths, 0))
        tokens = np.array([[held[row][counts[row] - 1]] for row in range(rows)])
        lengths = np.ones(rows, np.int64)


def _end(request: Request, row: int, token: int, count: int, most: int) -> tuple[str | None, str]:
    """Why a row ends with a token, or None, and the text that can be told now."""
    new = count - len(request.prompts[row])
    reason = EOS if token in request.eos else STOP if token in request.stop_ids else None
    text = ""
    if request.writers:
        writer = request.writers[row]
        # What ends a text is no part of it.
        text = writer.push(token) if reason is None else ""
        if writer.ended:
            return STOP, text
    # One token more than there are positions can be told: it is not read.
    if reason is None and (new >= request.max_new_tokens or count > most):
        reason = LENGTH
    if reason is not None and request.writers:
        writer = request.writers[row]
        text += writer.finish()
        reason = STOP if writer.ended else reason
    return reason, text


def generate(decoder: Decoder, request: Request) -> Generated:
    """All steps together."""
    rows = len(request.prompts)
    made = Generated([[] for _ in range(rows)], [""] * rows if request.tell else None, [""] * rows)
    for step in steps_of(decoder, request):
        for row, token in enumerate(step.tokens):
            if token is None:
                continue
            made.tokens[row].append(token)
            if made.texts is not None and step.texts is not None:
                made.texts[row] += step.texts[row]
            made.reasons[row] = step.reasons[row] or made.reasons[row]
    return made
