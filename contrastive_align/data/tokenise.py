"""Group -> token ids: rendered, compared with what was given, split and cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from contrastive_align.data.formats import Group
from contrastive_align.data.messages import Text
from contrastive_align.data.rows import BadRow


class NoRoom(BadRow):
    """The prompt alone fills ``max_length``: dropped and counted, whatever ``on_bad_row`` says, as TRL does."""


@dataclass
class TokenisedGroup:
    """Token ids of one group."""

    prompt_ids: list[int]  # the tokens all completions share, BOS included where the tokenizer has one
    completion_ids: list[
        list[int]
    ]  # K lists; text ends with one EOS, a dialogue as its template ends, unless it was cut
    cut_completions: int = 0  # how many of the K were cut to fit max_length
    cut_prompt_tokens: int = 0  # how many tokens the prompt lost at its start
    moved_boundary: int = 0  # the prompt's last tokens that differ once a completion follows, and are scored with it


def tokenise_group(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> TokenisedGroup:
    """Tokenise prompt and completions together and split where they part.

    As TRL's DPO does for pairs: prompt alone and prompt + completion are tokenised, and the completion starts where
    they diverge, for all K at the same place. BOS at most once, at the front. A completion of plain text ends with one
    EOS; a turn of a dialogue ends as its chat template ends it.

    ``max_prompt_length`` keeps the end of the prompt; then every completion is cut to ``max_length`` less the prompt
    and loses its EOS with its end.

    Raises:
        NoRoom: the prompt leaves no room for a completion token.
        BadRow: the template refuses the messages or leaves some of their text out, prompt and completion share no token
            to start from, or a completion has no token of its own.
    """
    [found] = tokenise_groups([group], tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    if isinstance(found, BadRow):
        raise found
    return found


def tokenise_groups(
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> list[TokenisedGroup | BadRow]:
    """Do what :func:`tokenise_group` does for many groups in one call of the tokenizer; errors are in their places."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no eos_token, without which no completion can end. Set "
            "one: in its tokenizer_config.json, or in Python tokenizer.eos_token = '</s>', for instance."
        )
    rendered: list[Any] = []
    for group in groups:
        try:
            rendered.append(_render(group, tokenizer))
        except BadRow as error:
            rendered.append(error)
    found: list[Any] = [item if isinstance(item, BadRow) else None for item in rendered]
    for chat in (False, True):
        places = [
            i for i, g in enumerate(groups) if g.is_conversational == chat and not isinstance(rendered[i], BadRow)
        ]
        texts = [text for i in places for text in rendered[i]]
        ids = iter(_encode(texts, tokenizer, special=not chat))
        for i in places:
            of_group = [_one_bos(next(ids), tokenizer.bos_token_id) for _ in rendered[i]]
            try:
                found[i] = _parted(of_group, groups[i], tokenizer, max_length, max_prompt_length)
            except BadRow as error:
                found[i] = error
    return found


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=special, **options)["input_ids"]


def _render(group: Group, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of the prompt and of prompt + completion, K + 1 in all."""
    prompt: Any = group.prompt
    if not group.is_conversational:
        eos: Any = tokenizer.eos_token
        completions: list[Any] = group.completions
        closed = [text.rstrip() if text.rstrip().endswith(eos) else text + eos for text in completions]
        return [prompt, *(prompt + text for text in closed)]
    texts = [render_messages(group.prompt, tokenizer, add_generation_prompt=True, **group.template_kwargs)]
    for i, completion in enumerate(group.completions):
        whole = [*prompt, *completion]
        texts.append(render_messages(whole, tokenizer, **group.template_kwargs))
        _check_rendered(completion, texts[-1], f"completion {i}")
    _check_rendered(prompt, texts[1] if len(texts) > 1 else texts[0], "the prompt")
    if tools := group.template_kwargs.get("tools"):
        names = [tool.get("function", tool).get("name") for tool in tools if isinstance(tool, Mapping)]
        lost = [name for name in names if isinstance(name, str) and name not in texts[0]]
        if lost:
            raise BadRow(
                f"the chat template renders nothing of the tool '{lost[0]}'. Use a model whose template knows "
                "tools, or drop the row (on_bad_row='drop')."
            )
    return texts


def render_messages(turns: Text, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str:
    """Return the text of a dialogue under the tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has no chat template.
        BadRow: the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"The prompts are conversations, but the tokenizer of {tokenizer.name_or_path!r} has no chat template. "
            "Set one: in the file chat_template.jinja beside it, or in Python tokenizer.chat_template. Or give prompts "
            "and completions as plain text."
        )
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        return text
    except Exception as error:  # whatever a template raises
        roles = [turn.get("role") for turn in turns]
        raise BadRow(
            f"the chat template refuses the messages (roles {roles}): {type(error).__name__}: {error}. Change the "
            "row, or drop it (on_bad_row='drop')."
        ) from error


def _check_rendered(turns: Sequence[Mapping[str, Any]], text: str, what: str) -> None:
    """Check that what was given stands in what was rendered."""
    for turn in turns:
        content = (turn.get("content") or "").rsplit("</think>", 1)[-1].strip()  # templates leave out earlier thoughts
        if content and content not in text:
            raise BadRow(
                f"the chat template leaves out a text of {what}: {content[:60]!r} (role '{turn.get('role')}'). "
                "Use another template, or drop the row (on_bad_row='drop')."
            )
        for call in turn.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            leaves = [function.get("name"), *_leaves(function.get("arguments"))]
            lost = [
                leaf
                for leaf in leaves
                if isinstance(leaf, str) and leaf not in text and json.dumps(leaf)[1:-1] not in text
            ]
            if lost or not leaves[0]:
                raise BadRow(
                    f"the chat template leaves out the tool call of {what}: {str(lost or call)[:60]}. Use a "
                    "model whose template knows tool calls, or drop the row (on_bad_row='drop')."
                )


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            yield value
            return
        if isinstance(inner, Mapping | list):
            yield from _leaves(inner)
        else:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _parted(
    encoded: list[list[int]],
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    max_prompt_length: int | None,
) -> TokenisedGroup:
    """Split prompt + completion where they diverge from the prompt, and cut."""
    (prompt_ids, *full_ids), eos = encoded, tokenizer.eos_token_id
    start = min(_common(prompt_ids, ids) for ids in full_ids)
    start = min(start, *(_common(full_ids[0], ids) for ids in full_ids[1:])) if len(full_ids) > 1 else start
    completion_ids = [ids[start:] if group.is_conversational else _one_eos(ids[start:], eos) for ids in full_ids]
    for i, ids in enumerate(completion_ids):
        if not ids or all(token == eos for token in ids):
            raise BadRow(
                f"completion {i} has no token of its own after the prompt's {start} tokens (its last: "
                f"{prompt_ids[max(0, start - 3) : start]}). The chat template may drop its content; drop the row "
                "(on_bad_row='drop')."
            )
    if not start:
        raise BadRow(
            f"the prompt's tokens {prompt_ids[:8]} and those of prompt + completion {full_ids[0][:8]} differ from the "
            "first on, so that nothing is left to condition on. End the prompt on a token boundary, for instance with "
            "a newline, or drop the row (on_bad_row='drop')."
        )
    open_prompt = _without_eos(prompt_ids, eos)  # a tokenizer may close every text it reads
    moved = max(0, len(open_prompt) - start)
    found = TokenisedGroup(prompt_ids[:start], completion_ids, moved_boundary=moved)
    return fit(found, max_length, max_prompt_length, tokenizer.bos_token_id)


def _common(a: list[int], b: list[int]) -> int:
    """Return how many first tokens two lists share."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def fit(ids: TokenisedGroup, max_length: int | None, max_prompt_length: int | None, bos: int | None) -> TokenisedGroup:
    """Cut to length: the prompt keeps its end (and its BOS), every completion its beginning."""
    prompt_ids, completion_ids = ids.prompt_ids, ids.completion_ids
    cut_prompt = 0
    if max_prompt_length is not None and len(prompt_ids) > max_prompt_length:
        kept = prompt_ids[:1] if prompt_ids[0] == bos else []
        cut_prompt = len(prompt_ids) - max_prompt_length
        prompt_ids = kept + prompt_ids[len(kept) + cut_prompt :]
    cut = 0
    if max_length is not None:
        room = max_length - len(prompt_ids)
        if room < 1:
            raise NoRoom(
                f"the prompt has {len(prompt_ids)} tokens and max_length is {max_length}: no room for a completion "
                "token. Raise max_length, or set max_prompt_length (the prompt keeps its end)."
            )
        cut = sum(len(ids) > room for ids in completion_ids)
        completion_ids = [ids[:room] for ids in completion_ids]
    return TokenisedGroup(prompt_ids, completion_ids, cut, cut_prompt, ids.moved_boundary)


def tokenise_prompt(prompt: Text, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> list[int]:
    """Token ids of a prompt: text as the tokenizer reads it, messages by its chat template; BOS at most once, in front.

    Raises:
        ValueError: messages, and a tokenizer without a chat template.
        BadRow: the template refuses the messages.
    """
    chat = not isinstance(prompt, str)
    text = render_messages(prompt, tokenizer, add_generation_prompt=True, **template_kwargs) if chat else prompt
    return _one_bos(_encode([text], tokenizer, special=not chat)[0], tokenizer.bos_token_id)


def _one_bos(ids: list[int], bos: int | None) -> list[int]:
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids


def _one_eos(ids: list[int], eos: int) -> list[int]:
    return [*_without_eos(ids, eos), eos]


def _without_eos(ids: list[int], eos: int) -> list[int]:
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids
