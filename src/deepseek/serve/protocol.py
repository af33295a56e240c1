"""Request bodies: OpenAI's, with vLLM's sampling fields, and our own options under one key, `deepseek`.

Null means "not given" for every field that has a default. Unknown fields are errors, as at OpenAI; a known field that
is not supported may only have a value that asks for nothing. Inside messages and tools unknown keys are ignored, so
that a client can send an answer back as it is. Bounds that depend on the model are checked where the engine's request
is made (engine/sampler.py, engine/llm.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Id = Annotated[int, Field(strict=True)]
T = TypeVar("T")
Each = Annotated[list[T], Field(fail_fast=True)]  # a list with a million wrong items reports the first
Ids = Annotated[Each[Id], Field(min_length=1)]
MESSAGES, PROMPTS, STOPS, STOP_LENGTH = 4096, 2048, 64, 1024  # of one request; characters
CHOSEN = 256  # members of the pool that a request may name
Prompts = Text | Annotated[Each[Text], Field(min_length=1, max_length=PROMPTS)] | Ids | Annotated[
    Each[Ids], Field(min_length=1, max_length=PROMPTS)]
Stop = Annotated[str, Field(strict=True, max_length=STOP_LENGTH)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        names, optional = _names(cls)
        if len(given) > len(names) and cls.model_config.get("extra") == "forbid":
            unknown = next(key for key in given if key not in names)  # one of a million is reported
            given = {key: value for key, value in given.items() if key in names or key == unknown}
        if None not in given.values():
            return given
        return {key: value for key, value in given.items() if value is not None or key not in optional}


@lru_cache(None)
def _names(form: type[Body]) -> tuple[frozenset[str], frozenset[str]]:
    """(all fields of a body, those that may be left out), as clients write them."""
    fields = {field.alias or name: field for name, field in form.model_fields.items()}
    return frozenset((*fields, *form.model_fields)), frozenset(
        name for name, field in fields.items() if not field.is_required())


class Part(Body):
    """A part of a message or a tool: unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore")


class Sampling(Body):
    """vLLM's sampling fields, at the top level or under `deepseek`; None is "not given"."""

    top_k: Annotated[int, Field(strict=True, ge=-1)] | None = None  # -1 and 0 are off
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    ignore_eos: Flag | None = None
    min_tokens: Natural | None = None
    stop_token_ids: Each[Natural] | None = None
    skip_special_tokens: Flag | None = None
    prompt_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None


class TemplateVariables(Body):
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_variables(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := {"messages", "tools", "add_generation_prompt", "continue_final_message"} & given.keys():
            raise ValueError(f"must not hold {sorted(taken)[0]!r}, which is a field of its own")
        return given


class Templating(TemplateVariables):
    """Fields that control the chat template."""

    add_generation_prompt: Flag | None = None
    continue_final_message: Flag = False
    reasoning_effort: Effort | None = None

    @model_validator(mode="after")
    def _one_end(self) -> Templating:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: must not stand beside add_generation_prompt = true")
        return self

    @property
    def variables(self) -> dict[str, Any]:
        own = {} if self.add_generation_prompt is None else {"add_generation_prompt": self.add_generation_prompt}
        return self.chat_template_kwargs | own | {"continue_final_message": self.continue_final_message}


class AcceptedFields(Body):
    """OpenAI's fields that are accepted and change no answer."""

    store: Flag = False
    metadata: dict[str, Any] = {}
    service_tier: Literal["auto", "default"] = "auto"
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    safety_identifier: Text | None = None
    user: Text | None = None


def complaint(errors: Sequence[Any]) -> tuple[str, str]:
    """(field, message) of the first field that pydantic refuses.

    Of the alternatives that a field may be, the one that matched furthest; a wrong type explains what else is missing.
    """
    places = [tuple(part for part in error["loc"] if part != "body") for error in errors]
    first = places[0][:1]
    chosen = max((i for i, place in enumerate(places) if place[:1] == first),
                 key=lambda i: (len(places[i]), places[i][-1:] == ("type",)))
    where = ".".join(str(part) for part in places[chosen] if part != "str" and "[" not in str(part))
    return where, f"{where}: {errors[chosen]['msg']}" if where else str(errors[chosen]["msg"])


def _numbers(pattern: str, what: str) -> BeforeValidator:
    """A validator that refuses an object at its first wrong entry; pydantic would list them all."""
    def check(given: Any) -> Any:
        for key, value in given.items() if isinstance(given, dict) else ():
            if not (re.fullmatch(pattern, key, re.DOTALL) and isinstance(value, int | float)
                    and not isinstance(value, bool) and abs(value) <= 1e308):
                raise ValueError(f"{key!r:.60}: {value!r:.60}: must be {what} with finite numbers")
        return given

    return BeforeValidator(check)


class Experts(Body):
    """Overrides of expert routing (engine/routing_override.py): answers differ from the model's own."""

    mask: Each[Text] = []
    bias: Annotated[dict[Text, Number], _numbers(r".*", "names")] = {}
    top_k: Count | None = None
    approx: Flag = False


class DeepseekOptions(Sampling):
    """Our own options. domain: the subject of the request, for batching by expert and for measuring routing. routed:
    return how many of the request's tokens visited each expert. show_experts: return each named group's share of the
    gate's weight. pool: whether the server's pool decides who answers, or which of its members it may choose. trace:
    return how it decided. adapter: as of LLM.generate. The others are SamplingParams by name."""

    domain: Annotated[str, Field(strict=True, min_length=1, max_length=64)] | None = None
    routed: Flag = False
    show_experts: Flag = False
    pool: Flag | Annotated[Each[Text], Field(min_length=1, max_length=CHOSEN)] | None = None
    trace: Flag = False
    adapter: Text | Annotated[dict[Text, Any], Field(min_length=1, max_length=CHOSEN)] | None = None
    experts: Experts | None = None
    regex: Text | None = None
    grammar: Text | None = None


class StreamOptions(Body):
    include_usage: Flag = False
    include_obfuscation: Flag = False  # padding against eavesdroppers who count bytes: none is sent


class GenerationRequest(Sampling, AcceptedFields):
    """Fields of all requests that generate text."""

    model: Text
    temperature: Number = 1.0
    top_p: Number = 1.0
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    deepseek: DeepseekOptions = DeepseekOptions()

    @model_validator(mode="after")
    def _given_once(self) -> GenerationRequest:
        for name in Sampling.model_fields:
            here, there = getattr(self, name), getattr(self.deepseek, name)
            if None not in (here, there) and here != there:
                raise ValueError(f"{name}: is {here!r}, and {there!r} under deepseek: must be given once")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """SamplingParams that were given, by name."""
        both = {name: getattr(self, name) if getattr(self, name) is not None else getattr(self.deepseek, name)
                for name in Sampling.model_fields}
        if both["top_k"] == -1:
            both["top_k"] = 0
        return {name: value for name, value in both.items() if value is not None}


class Common(GenerationRequest):
    """Fields of chat and text completions."""

    max_tokens: Count | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=16)] = 1
    stop: Stop | Annotated[Each[Stop], Field(max_length=STOPS)] | None = None
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Number],
                          _numbers("[0-9]{1,9}", "token ids")] = {}


PARTS = ("text", "refusal", "input_text", "output_text", "reasoning_text")  # of chat, then of /v1/responses


def _parts(content: Any) -> Any:
    """Refuse parts that are not text, by name."""
    if isinstance(content, list):
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in PARTS:
                raise ValueError(f"part {i} is of type {kind!r}: must be text")
    return content


class ContentPart(Part):
    type: Literal["text", "refusal", "input_text", "output_text", "reasoning_text"]
    text: Text = ""
    refusal: Text = ""


def join_parts(content: str | Sequence[ContentPart] | None) -> str:
    """The text of a content."""
    return content if isinstance(content, str) else "".join(part.text or part.refusal for part in content or ())


class FunctionCall(Part):
    name: Text
    arguments: Text | dict[str, Any] = "{}"


class ToolCall(Part):
    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Text | Each[ContentPart] | None, BeforeValidator(_parts)] = None
    name: Text | None = None
    tool_calls: Each[ToolCall] = []
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    function_call: FunctionCall | None = None  # before there were tools
    refusal: Text | None = None

    @model_validator(mode="after")
    def _content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: must be given")
        return self

    @property
    def text(self) -> str:
        return join_parts(self.content)


Messages = Annotated[Each[Message], Field(min_length=1, max_length=MESSAGES)]


class Function(Part):
    name: Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: Flag | None = None


class Tool(Part):
    type: Literal["function"] = "function"
    function: Function


def _check_tools(names: Sequence[str], choice: Any, chosen: str | None, form: str) -> None:
    """Whether tools agree with tool_choice, which names `chosen`, and with the type of the answer's format."""
    if len(set(names)) < len(names):
        raise ValueError("tools: a name comes twice")
    if choice in (None, "none", "auto"):
        return
    if not names:
        raise ValueError("tool_choice: needs tools")
    if chosen is not None and chosen not in names:
        raise ValueError(f"tool_choice: no tool is named {chosen!r}")
    if form != "text":
        raise ValueError(f"tool_choice: where a tool has to be called, the format must be text, not {form}")


def _must_be_null(instead: str) -> Callable[[Any], None]:
    def check(given: Any) -> None:
        if given is not None:
            raise ValueError(f"must be null: send {instead}")

    return check


class NamedFunction(Part):
    name: Text


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class Schema(Body):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: Text = "answer"
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: Flag | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: must be given with type json_schema, and with it alone")
        return self


class ChatRequest(Common, Templating):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Each[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag = True
    modalities: Each[Literal["text"]] = ["text"]
    verbosity: Literal["low", "medium", "high"] = "medium"
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    functions: Annotated[None, BeforeValidator(_must_be_null("tools"))] = None
    function_call: Annotated[None, BeforeValidator(_must_be_null("tool_choice"))] = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs = true")
        if None not in (limits := {self.max_tokens, self.max_completion_tokens}) and len(limits) > 1:
            raise ValueError(f"max_completion_tokens: is {self.max_completion_tokens}, and max_tokens is "
                             f"{self.max_tokens}: must be given once")
        _check_tools([tool.function.name for tool in self.tools or ()], self.tool_choice,
                     self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None,
                     "text" if self.response_format is None else self.response_format.type)
        return self


class Item(Part):
    """An item of the input of /v1/responses: a message, or an item of an earlier answer."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[Text | Each[ContentPart] | None, BeforeValidator(_parts)] = None
    call_id: Text | None = None
    name: Text | None = None
    arguments: Text | None = None
    output: Annotated[Text | Each[ContentPart] | None, BeforeValidator(_parts)] = None

    @model_validator(mode="after")
    def _complete(self) -> Item:
        needs = {"message": ("role", "content"), "reasoning": (), "function_call": ("call_id", "name", "arguments"),
                 "function_call_output": ("call_id", "output")}[self.type]
        if missing := [name for name in needs if getattr(self, name) is None]:
            raise ValueError(f"{missing[0]}: must be given for an item of type {self.type}")
        return self


class FlatTool(Function):
    """A tool of /v1/responses, without the level `function`."""

    type: Literal["function"]


class FlatNamedTool(NamedFunction):
    type: Literal["function"]


class Format(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Text | None = None
    description: Text | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag | None = None

    @model_validator(mode="after")
    def _schema(self) -> Format:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("schema: must be given with type json_schema, and with it alone")
        return self


class TextOptions(Body):
    format: Format = Field(default_factory=lambda: Format.model_validate({}))
    verbosity: Literal["low", "medium", "high"] = "medium"


class Reasoning(Body):
    effort: Effort | None = None
    summary: Literal["auto"] | None = None


class ResponsesRequest(GenerationRequest, TemplateVariables):
    """The body of /v1/responses. store: keep the response, so that it can be read and continued."""

    input: Text | Annotated[Each[Item], Field(min_length=1, max_length=MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    tools: Each[FlatTool] = []
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: Flag = True
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    previous_response_id: Text | None = None
    store: Flag = True
    include: Each[Literal["reasoning.encrypted_content"]] = []  # reasoning comes and goes unencrypted
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    top_logprobs: Literal[0] = 0
    max_tool_calls: None = None
    conversation: None = None
    prompt: None = None

    @model_validator(mode="after")
    def _agree(self) -> ResponsesRequest:
        _check_tools([tool.name for tool in self.tools], self.tool_choice,
                     self.tool_choice.name if isinstance(self.tool_choice, FlatNamedTool) else None,
                     self.text.format.type)
        return self


class CompletionRequest(Common):
    prompt: Prompts
    parse_special: Flag = False  # control tokens that a text spells out count as tokens
    max_tokens: Natural | None = None  # 0 runs the prompt alone, for its log-probabilities
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    echo: Flag = False
    best_of: Count | None = None
    suffix: Annotated[None, BeforeValidator(_must_be_null("a prompt with fill-in-the-middle tokens"))] = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of = {self.best_of}: must be n ({self.n}): every choice is sent")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return _each(self.prompt)


class EmbeddingRequest(Body):
    model: Text
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    user: Text | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _each(self.input)


def _each(given: Any) -> list[str | list[int]]:
    """The prompts of a field: one text or one list of ids is a list of one."""
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


class TokenizeRequest(Templating):
    """vLLM's tokenize request: a prompt or messages. add_special_tokens: put the begin token before a prompt."""

    model: Text | None = None
    prompt: Text | None = None
    parse_special: Flag = False
    messages: Messages | None = None
    tools: Each[Tool] | None = None
    add_special_tokens: Flag = True
    return_token_strs: Flag = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: must be given, or messages, and not both")
        return self


class DetokenizeRequest(Body):
    model: Text | None = None
    tokens: Each[Natural]


class WarmRequest(Body):
    """Named groups whose experts are loaded into memory."""

    experts: Annotated[Each[Text], Field(min_length=1)]


class FeedbackRequest(Body):
    """A rating of an answer. id: that of the completion."""

    id: Text
    rating: Literal["up", "down"]
    comment: Annotated[str, Field(strict=True, max_length=2000)] | None = None
