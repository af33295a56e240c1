"""Text <-> ids, for any Hugging Face tokenizer.json, and its chat template.

Control tokens and user text. A model obeys `<|User|>` or `<|end_of_sentence|>` as commands, so text that merely
contains those characters must not turn into them. There are two views of one tokenizer.json: in the full one control
tokens are recognised (`special=True`, for what a chat template wrote), in the plain one they are spelt out as ordinary
text (the default). Control tokens are the added tokens marked special and those in angle brackets: DeepSeek's files
leave `<｜User｜>` and `</think>` unmarked. `encode_chat` uses both views, each for its part of a rendered conversation.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from os.path import lexists
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from .conversation import ROLES, THINK, THOUGHT, Style, normalize
from .domain import trie
from .errors import ConfigError, DataError, MoEDRError, NotFoundError, RequestError, shown
from .files import not_utf8, read_json, read_text, write_atomically, write_json
from .templates import render
from .tiktokens import BYTES, FILE, convert

# The splits of DeepSeek-V3's tokenizer.json, in order: up to three digits, Chinese and kana, everything else; the last
# also goes over the pieces of the others.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# The same cuts in one pass, 1.4 times as fast (tests/test_tokenizer.py holds them together). Chinese and kana have
# their own alternatives (letters, punctuation, the rest), so the others leave them out, and the look-ahead digits too.
_ZH = "一-龥\u3040-ゟ゠-ヿ"
SPLIT = (
    rf"\p{{N}}{{1,3}}|[{_ZH}&&[^\p{{L}}\p{{P}}\p{{S}}]]?[{_ZH}&&[\p{{L}}\p{{M}}]]+|[{_ZH}&&[\p{{P}}\p{{S}}]]+"
    rf"|[{_ZH}&&[^\p{{L}}\p{{M}}\p{{P}}\p{{S}}]]+(?![{_ZH}&&[\p{{L}}\p{{M}}]])"
    r"""|[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}&&[^{_ZH}]]+| ?[\p{{P}}\p{{S}}&&[^{_ZH}]]+[\r\n]*"
    rf"|\s*[\r\n]+|\s+(?![^\s\p{{N}}{_ZH}])|\s+"
)
BOS, EOS, PAD, USER, ASSISTANT = SPECIAL = (
    "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>", "<|User|>", "<|Assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ASSISTANT + "' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('role must be system, user or assistant, got ' ~ message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
# Spellings tried where no tokenizer_config.json names the token.
_USUAL = {"bos_token": ("<｜begin▁of▁sentence｜>", BOS, "<s>"), "eos_token": ("<｜end▁of▁sentence｜>", EOS, "</s>"),
          "pad_token": ("<｜▁pad▁｜>", PAD, "<pad>")}
_THINKING = frozenset((THINK, THOUGHT))  # templates cut assistant turns at these
_OURS = frozenset(("messages", "add_generation_prompt", "continue_final_message"))  # variables with their own keywords
_PART = 1 << 15  # characters
_OPEN, _CLOSE, _END = "\ufdd0", "\ufdd1", "\ufdd2"  # Unicode noncharacters: no text has them


class Tokenizer:
    """A tokenizer.json with what stands beside it. Make one with `load` or `train`."""

    def __init__(self, definition: str, config: Mapping[str, Any] | None = None, template: str | None = None,
                 generation: Mapping[str, Any] | None = None) -> None:
        """definition: the text of tokenizer.json; config, generation: the keys of tokenizer_config.json and
        generation_config.json; template: the chat template."""
        self.definition, self._config, self._generation = definition, dict(config or {}), dict(generation or {})
        self._full = tokenizers.Tokenizer.from_str(definition)
        self._template = template
        self._variables: dict[str, Any] = {}
        self._warned = False
        self._added: list[dict[str, Any]] = json.loads(definition).get("added_tokens") or []
        self._added_ids = frozenset(token["id"] for token in self._added)
        self._texts: dict[int, str] = {}
        self._skipped = frozenset(token["id"] for token in self._added if token["special"])
        self._names: dict[str, str] = {}
        present = {token["content"] for token in self._added}
        for key in {**_USUAL, **self._config}:
            named = self._config.get(key)
            named = named.get("content") if isinstance(named, Mapping) else named
            if named is None and key not in self._config:
                named = next((usual for usual in _USUAL[key] if usual in present), None)
            if key.endswith("_token") and isinstance(named, str):
                self._names[key] = named
        self.bos_id, self.eos_id, self.pad_id = (self._id_of(key) for key in _USUAL)
        self.vocab_size = max(self._full.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder with tokenizer.json (or tokenizer.json.gz, or tiktoken.model), or such a file and its
        neighbours.

        Raises NotFoundError or DataError, naming the file.
        """
        path = Path(path).expanduser()
        folder = path if path.is_dir() else path.parent
        tried = [path / "tokenizer.json", path / "tokenizer.json.gz"] if path.is_dir() else [path]
        file = next((file for file in tried if file.is_file()), None)
        if file is None and not (path / FILE).is_file():
            raise NotFoundError(f"{tried[0]}: no such file{_other_kind(folder)}")
        config = _settings(folder / "special_tokens_map.json") | _settings(folder / "tokenizer_config.json")
        template = _template_of(config.pop("chat_template", None), folder / "tokenizer_config.json")
        if lexists(jinja := folder / "chat_template.jinja"):
            template = read_text(jinja)
        generation = _generation(folder / "generation_config.json")
        if file is None:
            text, config = convert(path, config)
            with _failing(f"{path / FILE}: not a tokenizer"):
                return cls(text, config, template, generation)
        with _failing(f"{file}: not a tokenizer"):
            raw = file.read_bytes()
            text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
            return cls(text, config, template, generation)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
        """Learn a byte-level BPE with DeepSeek-V3's splits; equal texts give an equal tokenizer.

        vocab_size: tokens at most, the 5 special ones (ids 0-4) and the 256 bytes included; few texts give fewer.
        min_frequency: a pair must occur so often to be merged.
        """
        least = len(SPECIAL) + 256
        if vocab_size < least:
            raise ConfigError(f"vocab_size = {vocab_size}: must be at least {least} (256 bytes and {len(SPECIAL)} "
                              "special tokens)")
        learner = tokenizers.Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        learner.decoder = decoders.ByteLevel()
        learner.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
                  "clean_up_tokenization_spaces": False}
        return cls(learner.to_str(pretty=True), config, CHAT_TEMPLATE)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json with its template, and generation_config.json if one was read."""
        folder = Path(folder)
        config = self._config | ({"chat_template": self._template} if self._template is not None else {})
        write_atomically(folder / "tokenizer.json", self.definition)
        write_json(folder / "tokenizer_config.json", config)
        if self._generation:
            write_json(folder / "generation_config.json", self._generation)

    # ---- ids --------------------------------------------------------------------------------------------------

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: the tokenizer's own, then generation_config.json's."""
        more = self._generation.get("eos_token_id")
        ids = [self.eos_id, *(more if isinstance(more, list) else [more])]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides ids: tokenizer.json, the special tokens, the chat template."""
        parts = [self.definition, self._names, self._template, *([self._variables] if self._variables else [])]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _control(self) -> frozenset[str]:
        names = ((token["content"], token["special"]) for token in self._added)
        return frozenset(name for name, special in names if special or (name.startswith("<") and name.endswith(">")))

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The view that spells control tokens out: all of them marked special, and special ones not recognised."""
        definition = json.loads(self.definition)
        for token in definition.get("added_tokens") or []:
            token["special"] = token["content"] in self._control
        with _failing("the tokenizer fails"):
            plain = tokenizers.Tokenizer.from_str(json.dumps(definition, allow_nan=False))
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def pieces(self) -> tokenizers.Tokenizer | None:
        """The plain view without its splits, for texts that are cut at them already; None where the tokenizer cuts
        elsewhere than DeepSeek-V3's, or does more to a text than that (data/encode.py)."""
        about = json.loads(self.definition)
        model, steps = about["model"], (about.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
        cuts = [str(step.get("pattern", {}).get("Regex")).replace("\r", r"\r").replace("\n", r"\n")
                for step in steps[:-1] if step.get("behavior") == "Isolated" and not step["invert"]]
        if not (cuts in ([SPLIT], [*SPLITS]) and len(cuts) == len(steps) - 1 and steps[-1].get("type") == "ByteLevel"
                and not steps[-1]["add_prefix_space"] and not steps[-1]["use_regex"]
                and model.get("type") == "BPE" and not model.get("dropout")
                and (about.get("normalizer") or {"normalizers": []}).get("normalizers") == []
                and not about.get("truncation") and not about.get("padding")
                and {token["content"] for token in self._added} <= self._control):
            return None
        return tokenizers.Tokenizer.from_str(json.dumps(
            about | {"pre_tokenizer": steps[-1], "post_processor": None, "added_tokens": []}))

    def _id_of(self, key: str) -> int | None:
        return self._full.token_to_id(self._names[key]) if key in self._names else None

    def encode_prompt(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of a raw prompt, after the begin-of-sequence token where there is one. parse_special: control tokens in
        the text count, and one that begins the sequence is not put there again; else they are ordinary text."""
        ids = self.encode(text, special=parse_special)
        begin = self._begin(True)
        return ids if parse_special and begin and ids[:1] == begin else begin + ids

    @cached_property
    def adds_bos(self) -> bool:
        """Whether Hugging Face's tokenizer of these files puts the begin-of-sequence token before a text."""
        if isinstance(said := self._config.get("add_bos_token"), bool):
            return said and self.bos_id is not None
        return self.bos_id is not None and self._full.encode("").ids[:1] == [self.bos_id]

    def control_in(self, text: str) -> str | None:
        """The first control token that a text spells out."""
        found = self._control_pattern.search(text)
        return None if found is None else found[0]

    def warn_of_control(self, text: str, what: str) -> None:
        """A warning, once, where a text whose control tokens do not count spells one out. what: `a prompt`, say."""
        if not self._warned and (token := self.control_in(text)):
            self._warned = True
            warnings.warn(f"{what} spells out the control token {token!r}, which is ordinary text here; with "
                          "parse_special it counts as the token (said once)", stacklevel=3)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return any_of(self._control)

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`. bos: put the bos id first. special: recognise control tokens; else they are ordinary text.

        Raises DataError for a lone surrogate, which no UTF-8 text can hold.
        """
        return self._begin(bos) + self._batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, special: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [self._begin(bos) + ids for ids in self._batch(texts, special)]

    def _begin(self, bos: bool) -> list[int]:
        return [self.bos_id] if bos and self.bos_id is not None else []

    def _batch(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        view = self._full if special else self._plain
        with _failing("the tokenizer fails"):
            try:
                return [encoding.ids for encoding in view.encode_batch_fast(list(texts), add_special_tokens=False)]
            except TypeError:
                for text in texts:
                    if lone := re.search("[\ud800-\udfff]", text):
                        raise DataError(f"character {lone.start()} of a text is the lone surrogate {lone[0]!r}, "
                                        "which UTF-8 cannot hold") from None
                raise

    def surely_longer(self, text: str, most: int) -> bool:
        """Whether a text has more than `most` tokens, told from parts of it: a text of megabytes is not encoded to
        learn that it does not fit. False where only encoding it tells."""
        if 4 * len(text) <= 2 * most:  # UTF-8 has so many bytes at most, and no token less than one
            return False
        found = 0
        for start in range(0, len(text), _PART):
            if len(text) - start <= _PART:
                return False  # the rest is soon encoded
            part = text[start : start + _PART].encode(errors="replace").decode()
            found += len(self._plain.encode_batch_fast([part], add_special_tokens=False)[0])
            if found > 2 * most:  # a cut may change what is beside it, but not by half
                return True
        return False

    def check_length(self, text: str, most: int) -> None:
        """Raises RequestError for a text that is much longer than `most` tokens, before all of it is encoded."""
        if self.surely_longer(text, most):
            raise RequestError(f"the prompt has {len(text):,} characters, more than {2 * most:,} tokens: must leave "
                               f"room within the model's context (max_position_embeddings = {most})")

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids that the tokenizer does not have are left out."""
        ids = list(ids)
        if len(ids) < 100:
            return self._full.decode(ids, skip_special_tokens=skip_special)
        return self._full.decode_batch([ids], skip_special_tokens=skip_special)[0]  # other threads go on meanwhile

    def token_text(self, token: int) -> str:
        """One token as text, as `decode` has it; remembered: log-probabilities name the same ones again and again."""
        if token not in self._texts:
            self._texts[token] = self.decode([token], skip_special=False)
        return self._texts[token]

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text; in a byte-level vocabulary it may be part of a character."""
        piece = self._full.id_to_token(token) or ""
        added = token in self._added_ids
        if not added and BYTES.keys() >= set(piece) and "ByteLevel" in self._decoder:
            return bytes(BYTES[character] for character in piece)
        if not added and (byte := re.fullmatch("<0x([0-9A-F]{2})>", piece)):  # how other vocabularies fall back
            return bytes.fromhex(byte[1])
        return self.token_text(token).encode()

    @cached_property
    def _decoder(self) -> str:
        return json.dumps(json.loads(self.definition).get("decoder"))

    def stream(self, *, skip_special: bool = True) -> TokenStream:
        """A decoder for ids that come one at a time."""
        return TokenStream(self, self._skipped if skip_special else frozenset())

    # ---- chat -------------------------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def template(self) -> str | None:
        """The chat template."""
        return self._template

    def template_knows(self, variable: str) -> bool:
        """Whether the chat template reads a variable, such as `tools`."""
        return variable in self._words

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self._template or ""))

    def with_variables(self, variables: Mapping[str, Any] | None) -> Tokenizer:
        """This tokenizer, whose chat template gets these variables where a call does not say otherwise.

        Raises RequestError for one that the template does not read."""
        if not variables:
            return self
        self.check_variables(variables)
        other = copy.copy(self)
        other._variables = {**self._variables, **variables}
        other.__dict__.pop("fingerprint", None)
        return other

    def check_variables(self, variables: Any) -> None:
        """Raises RequestError unless these are an object of variables that the chat template reads."""
        if not isinstance(variables, Mapping):
            raise RequestError(f"chat_template_kwargs = {variables!r:.60}: must be an object, {{name: value}}")
        for name in variables:
            if name in _OURS or not isinstance(name, str) or not self.template_knows(name):
                raise RequestError(f"chat_template_kwargs: {name!r} is no variable that the chat template reads")

    def chat(self, messages: Sequence[Mapping[str, Any]], /, *, tools: Sequence[Mapping[str, Any]] | None = None,
             add_generation_prompt: bool = True, continue_final_message: bool = False, **extra: Any) -> str:
        """The conversation as the model was trained to see it. To get ids use `encode_chat`.

        messages: as clients write them (`conversation.normalize`). tools: OpenAI's; they go through the template where
        it knows tools, else in front. continue_final_message: the last message is left open, for the model to go on
        with. extra: further variables of the template, such as V3.1's `thinking`; it ignores what it does not read.
        Raises RequestError when there is no template or it refuses the messages.
        """
        return self._chat(messages, tools, add_generation_prompt, continue_final_message, extra, lambda value, _: value)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], at_most: int | None = None, /, *,
                    tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True,
                    continue_final_message: bool = False, **extra: Any) -> list[int]:
        """Ids of `chat(…)`. Control tokens count where the template wrote them, not where a message quotes them.

        at_most: a conversation of much more tokens is refused before it is encoded whole."""
        text = self.marked_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt,
                                continue_final_message=continue_final_message, **extra)
        if at_most is not None:
            self.check_length(text, at_most)
        return self.encode_marked(text)

    def marked_chat(self, messages: Sequence[Mapping[str, Any]], /, *,
                    tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True,
                    continue_final_message: bool = False, **extra: Any) -> str:
        """`chat(…)` with marks around every control token that is quoted. An assistant's `<think>` is none."""
        return self._chat(messages, tools, add_generation_prompt, continue_final_message, extra,
                          lambda value, role: self.marked(value) if role == "assistant"
                          else _mark(value, self._control_pattern))

    def marked(self, said: Any) -> Any:
        """What an assistant says, with marks around the control tokens that it quotes."""
        return _mark(said, any_of(self._control - _THINKING))

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text with marks."""
        # between marks is quoted text; a template's own string methods may have parted a pair, so lone marks only cut
        pieces = re.split(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]", text)
        return [i for n, piece in enumerate(pieces) if piece for i in self.encode(piece, special=n % 2 == 0)]

    @property
    def variables(self) -> dict[str, Any]:
        """What `with_variables` has set."""
        return dict(self._variables)

    def _chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, prompt: bool,
              go_on: bool, extra: Mapping[str, Any], mark: Callable[[Any, str], Any]) -> str:
        """`chat`, with every part of what is given put through `mark`(part, role)."""
        if self._template is None:
            raise RequestError("the tokenizer has no chat template, so it takes a prompt, not messages")
        if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)
                                  or not all(isinstance(tool, Mapping) for tool in tools)):
            raise RequestError(f"tools = {tools!r:.60}: must be a list of objects")
        plain = normalize(messages, self.roles)
        if go_on and (not plain or plain[-1]["role"] != "assistant" or not isinstance(plain[-1]["content"], str)):
            raise RequestError("continue_final_message: the last message must be an assistant's, with content")
        read = {name: value for name, value in extra.items() if self.template_knows(name)}
        fitted, shown = self._style.fit(plain, tools)
        marked = [mark(message, message["role"]) for message in fitted]
        if go_on:
            marked[-1]["content"] += _END + " "
        values = {**mark({**self._variables, **read}, ""), "tools": mark(shown, "")}
        text = self._render(marked, prompt and not go_on, values)
        if not go_on:
            return text
        end = text.rfind(_END)
        if end < 0:
            raise RequestError("continue_final_message: the chat template does not show the last message's end")
        return text[:end] if text[end : end + 2] == _END + " " else text[:end].rstrip()  # as the template trims

    def _render(self, messages: list[dict[str, Any]], prompt: bool, extra: Mapping[str, Any]) -> str:
        assert self._template is not None
        values = {"tools": None, "documents": None, **self._names, **extra,
                  "messages": messages, "add_generation_prompt": prompt}
        return render(self._template, values, trusted=self._template == CHAT_TEMPLATE)

    @cached_property
    def _style(self) -> Style:
        def attempt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str | None:
            try:
                return self._render(messages, True, {"tools": tools})
            except RequestError:
                return None

        return Style.of(self._template or "", attempt)

    @cached_property
    def roles(self) -> frozenset[str]:
        """Roles of the template's own, beside the usual ones."""
        return frozenset(re.findall(r"""role['"]?\]?\s*==\s*['"](\w+)['"]""", self._template or "")) - set(ROLES)


class TokenStream:
    """Text of ids that come one at a time: what `push` and `flush` return adds up to `decode` of all ids.

    A character's bytes may be spread over tokens, so text is held back while it ends in U+FFFD. The ids of the last
    whole piece are kept as context, for tokenizers whose first token of a text decodes differently.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._ids: list[int] = []
        self._context = 0  # ids that are context
        self._said = 0  # characters of decode(ids) that are out

    def push(self, token: int) -> str:
        """The text that is certain after one more id; often empty in the middle of a character."""
        if token in self._skipped:
            return ""
        self._ids.append(token)
        text = self._text()
        certain = text.rstrip("\ufffd")
        out, self._said = certain[self._said:], max(self._said, len(certain))
        if certain == text and out:
            self._ids, self._context = self._ids[self._context:], len(self._ids) - self._context
            self._said = len(self._text())
        return out

    def flush(self) -> str:
        """What was held back, at the end of the ids."""
        out = self._text()[self._said:]
        self._said += len(out)
        return out

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special=False)


@lru_cache(maxsize=8)
def any_of(names: frozenset[str]) -> re.Pattern[str]:
    return re.compile(trie(names) or "(?!)")  # V3 has 800: tried one by one, a megabyte of "<" takes two seconds


def unmarked(text: str) -> str:
    """A text of `marked_chat` without its marks."""
    return re.sub(f"[{_OPEN}{_CLOSE}]", "", text)


def _mark(value: Any, control: re.Pattern[str]) -> Any:
    """`value` with every control token in its strings put between marks."""
    if isinstance(value, str):
        return control.sub(rf"{_OPEN}\g<0>{_CLOSE}", re.sub(f"[{_OPEN}{_CLOSE}{_END}]", "", value))
    if isinstance(value, Mapping):
        return {key: _mark(item, control) for key, item in value.items()}
    return [_mark(item, control) for item in value] if isinstance(value, list | tuple) else value


def _other_kind(folder: Path) -> str:
    """What a folder has instead of a tokenizer.json, for the end of a message."""
    for name, what in (("tokenizer.model", "SentencePiece's"), ("vocab.json", "slow tokenizers'"),
                       ("vocab.txt", "WordPiece's")):
        if (folder / name).is_file():
            return (f"; {name} is {what} format: let transformers write a tokenizer.json "
                    "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))")
    return ""


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """DataError for what the tokenizers library raises: bare Exceptions, and panics, which are not even those."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{what}: {not_utf8(error)}") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError | MoEDRError):
            raise
        said = str(error) if isinstance(error, ValueError) or type(error) is Exception else repr(error)
        raise DataError(f"{what}: {' '.join(said.split()):.500}") from None


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json or the like, {} where there is none. Raises DataError where a special token is no text."""
    if not lexists(path):
        return {}
    keys = read_json(path)
    for key in _USUAL:
        token = keys.get(key)
        token = token.get("content", 0) if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise DataError(f"{path}: {key} = {shown(keys[key])}: must be a text, an object with its content, or null")
    return keys


def _template_of(value: Any, path: Path) -> str | None:
    """A chat template; of several, by name, the default one."""
    if isinstance(value, list):
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value):
            raise DataError(f"{path}: chat_template = {shown(value)}: must be a text, or a list of objects with name "
                            "and template")
        value = {entry["name"]: entry.get("template", 0) for entry in value}.get("default")
    if not isinstance(value, str | None):
        raise DataError(f"{path}: chat_template = {shown(value)}: must be a text")
    return value


def _generation(path: Path) -> dict[str, Any]:
    """generation_config.json, {} where there is none. Raises DataError for an eos_token_id that is no id."""
    if not lexists(path):
        return {}
    keys = read_json(path)
    ends = keys.get("eos_token_id")
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and not (type(token) is int and 0 <= token < 1 << 31):
            raise DataError(f"{path}: eos_token_id = {shown(ends)}: must be a token id, a list of them, or null")
    return keys
