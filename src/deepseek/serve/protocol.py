"""What clients may send: OpenAI's request bodies, with what is ours under one key, `deepseek`.

A field that we do not know is an error, as at OpenAI; one that we know and do not do may only have the value that does
nothing. Bounds that depend on the model are checked where the request is made (engine/sampler.py, engine/llm.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
Flag = Annotated[bool, Field(strict=True)]
Nothing = Annotated[float, Field(strict=True, ge=0, le=0)]  # a knob that is not there may stand at zero
Text = Annotated[str, Field(strict=True)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Experts(Body):
    """Inexact controls of the gates (engine/control.py)."""

    mask: list[Text] = []
    bias: dict[Text, Number] = {}
    top_k: Count | None = None
    approx: Flag = False


class Extension(Body):
    """domain: what the request is about, for batching by expert and for measuring routing. routed: send back how many
    of the request's tokens visited each expert. The others are SamplingParams by name."""

    domain: Annotated[str, Field(strict=True, min_length=1, max_length=64)] | None = None
    routed: Flag = False
    experts: Experts | None = None
    top_k: Annotated[int, Field(strict=True, ge=0)] = 0
    min_p: Number = 0.0
    repetition_penalty: Number = 1.0
    ignore_eos: Flag = False
    regex: Text | None = None
    grammar: Text | None = None


class StreamOptions(Body):
    include_usage: Flag = False


class Common(Body):
    model: Text
    max_tokens: Count | None = None
    temperature: Number = 1.0
    top_p: Number = 1.0
    n: Annotated[int, Field(strict=True, ge=1, le=16)] = 1
    stop: Text | list[Text] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(strict=True, max_length=64)] | None = None
    deepseek: Extension = Extension()
    presence_penalty: Nothing = 0.0
    frequency_penalty: Nothing = 0.0
    logit_bias: dict[str, float] | None = Field(None, max_length=0)


class TextPart(Body):
    type: Literal["text"]
    text: Text


class FunctionCall(Body):
    name: Text
    arguments: Text


class ToolCall(Body):
    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content: must be given")
        return self


class Function(Body):
    name: Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: Flag | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Text


class NamedTool(Body):
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


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag = True

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs = true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_completion_tokens: must not stand beside max_tokens")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: a name comes twice")
        if self.tool_choice not in (None, "none", "auto"):
            if not names:
                raise ValueError("tool_choice: needs tools")
            if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice: no tool is named {self.tool_choice.function.name!r}")
            if self.response_format is not None and self.response_format.type != "text":
                raise ValueError("response_format: must be text where a tool has to be called")
        return self


class CompletionRequest(Common):
    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=5)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return _each(self.prompt)


class EmbeddingRequest(Body):
    model: Text
    input: Text | list[Text] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    user: Annotated[str, Field(strict=True, max_length=64)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _each(self.input)


def _each(given: Any) -> list[str | list[int]]:
    """One text or one list of ids is a list of one."""
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


class WarmRequest(Body):
    """Names whose experts are to be in memory from now on."""

    experts: Annotated[list[Text], Field(min_length=1)]


class FeedbackRequest(Body):
    """What somebody thinks of an answer. id: that of the completion."""

    id: Text
    rating: Literal["up", "down"]
    comment: Annotated[str, Field(strict=True, max_length=2000)] | None = None
