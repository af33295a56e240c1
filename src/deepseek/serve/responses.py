"""POST /v1/responses: OpenAI's newer API, translated to a chat request and back.

Items of the input become messages, and the answer becomes items of the output. Stored responses (in memory, the oldest
are dropped) can be read, deleted, and continued with `previous_response_id`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from ..errors import MoEDRError
from ..files import to_json
from .chat import Chat
from .middleware import ServeError, to_serve_error
from .protocol import (
    MESSAGES,
    ChatRequest,
    FlatNamedTool,
    FunctionCall,
    Item,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ResponsesRequest,
    Sampling,
    Schema,
    Tool,
    ToolCall,
    join_parts,
)
from .service import Server, usage

KEPT, KEPT_CHARACTERS = 1024, 64 << 20  # responses in memory


@dataclass(frozen=True)
class Stored:
    """A stored response. body: as it was sent. messages: the conversation so far, without instructions."""

    body: dict[str, Any]
    messages: list[Message]
    size: int


class Store:
    """Responses by id; the oldest are dropped where there are too many, or their texts too long."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._size = 0

    def keep(self, body: dict[str, Any], messages: list[Message]) -> None:
        size = len(json.dumps(body)) + sum(len(message.model_dump_json(exclude_defaults=True)) for message in messages)
        one = Stored(body, messages, size)
        self._kept[body["id"]] = one
        self._size += one.size
        while len(self._kept) > KEPT or self._size > KEPT_CHARACTERS:
            self._size -= self._kept.popitem(last=False)[1].size

    def find(self, name: str, param: str | None = None) -> Stored:
        """The response of this id. Raises ServeError for one that is not stored, or no longer."""
        if name not in self._kept:
            raise ServeError(404 if param is None else 400, f"response {name!r}: is not kept: it was not stored, or "
                             "long ago, or by another server", param=param, code="previous_response_not_found")
        return self._kept[name]

    def delete(self, name: str) -> None:
        self._size -= self.find(name).size
        del self._kept[name]


def to_messages(items: str | Sequence[Item]) -> list[Message]:
    """The chat messages of an input. Calls and reasoning join the assistant's message beside them."""
    if isinstance(items, str):
        return [Message(role="user", content=items)]
    out: list[Message] = []
    mine: Message | None = None  # the assistant's turn under way
    for item in items:
        if item.type == "function_call_output":
            out.append(Message(role="tool", tool_call_id=item.call_id, content=join_parts(item.output)))
            mine = None
        elif item.type == "message" and item.role != "assistant":
            assert item.role is not None
            out.append(Message(role=item.role, content=join_parts(item.content)))
            mine = None
        else:
            if mine is None or (item.type != "function_call" and (mine.content or mine.tool_calls)):
                mine = Message(role="assistant", content="")
                out.append(mine)
            if item.type == "reasoning":
                mine.reasoning_content = (mine.reasoning_content or "") + join_parts(item.content)
            elif item.type == "function_call":
                assert item.name is not None and item.arguments is not None
                mine.tool_calls.append(ToolCall(
                    id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments)))
            else:
                mine.content = join_parts(item.content)
    return out


def to_chat(body: ResponsesRequest, messages: Sequence[Message]) -> ChatRequest:
    """The equivalent chat request. Its fields have been checked as those of `body`."""
    system = [Message(role="system", content=body.instructions)] if body.instructions else []
    choice, form = body.tool_choice, body.text.format
    schema = None if form.json_schema is None else Schema.model_construct(json_schema=form.json_schema)
    same = (*Sampling.model_fields, "model", "temperature", "top_p", "seed", "stream", "user", "parallel_tool_calls",
            "deepseek", "chat_template_kwargs")
    return ChatRequest.model_construct(
        **{name: getattr(body, name) for name in same}, messages=[*system, *messages],
        max_completion_tokens=body.max_output_tokens, reasoning_effort=body.reasoning.effort,
        tools=[Tool.model_construct(function=tool) for tool in body.tools],
        tool_choice=NamedTool(type="function", function=NamedFunction(name=choice.name)) if isinstance(
            choice, FlatNamedTool) else choice,
        response_format=ResponseFormat.model_construct(type=form.type, json_schema=schema))



class Response:
    """One request to /v1/responses."""

    def __init__(self, store: Store, server: Server, http: Request, body: ResponsesRequest) -> None:
        self.server, self.store, self.body = server, store, body
        before = [] if body.previous_response_id is None else store.find(
            body.previous_response_id, "previous_response_id").messages
        self.messages = [*before, *to_messages(body.input)]
        if len(self.messages) > MESSAGES:
            raise ServeError(400, f"input: the conversation has {len(self.messages):,} messages: at most {MESSAGES:,}",
                             param="input")
        self.chat_body = to_chat(body, self.messages)
        self.id = f"resp_{secrets.token_hex(24)}"
        self.created = int(time.time())
        self.names: dict[str, str] = {}  # of output items
        self.number = 0
        self.chat = Chat(server, http, self.chat_body, self.id)

    # ---- what is sent -------------------------------------------------------------------------------------------

    def body_of(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, reason = self.body, self.chat.reason(0)
        given = body.model_dump(by_alias=True, exclude_none=True, include={"text", "tools", "tool_choice"})
        out = {"id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
               "incomplete_details": None if status != "incomplete" else {
                   "reason": "max_output_tokens" if reason == "length" else reason},
               "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": body.model,
               "output": output, "parallel_tool_calls": body.parallel_tool_calls, "background": False,
               "previous_response_id": body.previous_response_id, "reasoning": {
                   "effort": body.reasoning.effort, "summary": None},
               "store": body.store, "temperature": body.temperature, "text": {"format": given["text"]["format"]},
               "tool_choice": given.get("tool_choice", "auto"), "tools": given["tools"], "top_p": body.top_p,
               "truncation": "disabled", "usage": None, "user": body.user, "metadata": body.metadata}
        if status in ("completed", "incomplete"):
            counts, thoughts = usage([self.chat.answer]), self.chat.parsers[0].answer.reasoning
            new = counts["completion_tokens"]
            out["usage"] = {
                "input_tokens": counts["prompt_tokens"], "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": new,
                "output_tokens_details": {"reasoning_tokens": min(new, len(self.server.tokenizer.encode(thoughts)))},
                "total_tokens": counts["total_tokens"]}
            out |= self.chat.prompt_logprobs() | self.server.extra(self.chat_body, [self.chat.answer])
        return out

    def item(self, kind: str, text: str, done: bool = True) -> dict[str, Any]:
        """The reasoning or the message of the answer."""
        name = self.names.setdefault(kind, f"{'rs' if kind == 'reasoning' else 'msg'}_{secrets.token_hex(24)}")
        status = "completed" if done else "in_progress"
        parts = [self.part(kind, text)] if done else []
        if kind == "reasoning":
            return {"id": name, "type": "reasoning", "summary": [], "content": parts, "status": status}
        return {"id": name, "type": "message", "role": "assistant", "content": parts, "status": status}

    @staticmethod
    def part(kind: str, text: str) -> dict[str, Any]:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def call(self, call: dict[str, Any]) -> dict[str, Any]:
        name = self.names.setdefault(call["id"], f"fc_{secrets.token_hex(24)}")
        return {"id": name, "type": "function_call", "call_id": call["id"], "name": call["function"]["name"],
                "arguments": call["function"]["arguments"], "status": "completed"}

    def end(self) -> dict[str, Any]:
        """The complete response, which is stored if asked for."""
        self.chat.record_outcome()
        answer = self.chat.parsers[0].answer
        output = [self.item("reasoning", answer.reasoning)] if answer.reasoning else []
        if answer.content or not answer.calls:
            output.append(self.item("message", answer.content))
        output += [self.call(call) for call in answer.calls]
        reason = self.chat.answer.finish_reason()
        if reason != "stop" and output[-1]["type"] != "function_call":
            output[-1]["status"] = "incomplete"
        body = self.body_of("completed" if reason == "stop" else "incomplete", output)
        if self.body.store and reason in ("stop", "length"):
            self.store.keep(body, [*self.messages, Message.model_validate(answer.message())])
        return body

    async def complete(self, http: Request) -> JSONResponse:
        async for request in self.server.run_answers(http, [self.chat.answer]):
            self.chat.advance(request)
        return JSONResponse(self.end())

    # ---- events -------------------------------------------------------------------------------------------------

    def event(self, kind: str, **more: Any) -> bytes:
        data = {"type": kind, "sequence_number": self.number, **more}
        self.number += 1
        return f"event: {kind}\ndata: {to_json(data, ensure_ascii=False)}\n\n".encode()

    async def stream(self, http: Request) -> AsyncIterator[bytes]:
        """OpenAI's events; a stream that fails ends with `error`."""
        try:
            async for part in self._events(http):
                yield part
        except (ServeError, MoEDRError, OSError) as error:
            about = to_serve_error(error).body["error"]
            yield self.event("error", code=about["code"] or about["type"], message=str(error), param=about["param"])

    async def _events(self, http: Request) -> AsyncIterator[bytes]:
        yield self.event("response.created", response=self.body_of("in_progress", []))
        yield self.event("response.in_progress", response=self.body_of("in_progress", []))
        index, open_kind = -1, ""
        answer = self.chat.parsers[0].answer

        def close() -> list[bytes]:
            """Events that close the open item."""
            if not open_kind:
                return []
            text = answer.reasoning if open_kind == "reasoning" else answer.content
            item = self.item(open_kind, text)
            place: dict[str, Any] = {"item_id": item["id"], "output_index": index, "content_index": 0}
            own: dict[str, Any] = {} if open_kind == "reasoning" else {"logprobs": []}
            return [self.event(f"response.{self._kind(open_kind)}.done", **place, text=text, **own),
                    self.event("response.content_part.done", **place, part=self.part(open_kind, text)),
                    self.event("response.output_item.done", output_index=index, item=item)]

        async for request in self.server.run_answers(http, [self.chat.answer]):
            delta = self.chat.advance(request)
            ended = request.finish_reason is not None
            for kind, key in (("reasoning", "reasoning_content"), ("message", "content")):
                text = delta.get(key, "")
                if not text and not (ended and kind == "message" and not answer.content and not answer.calls):
                    continue  # an answer of nothing has an empty message
                if open_kind != kind:
                    for part in close():
                        yield part
                    index, open_kind = index + 1, kind
                    item = self.item(kind, "", done=False)
                    yield self.event("response.output_item.added", output_index=index, item=item)
                    yield self.event("response.content_part.added", item_id=item["id"], output_index=index,
                                     content_index=0, part=self.part(kind, ""))
                if text:
                    own: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
                    yield self.event(f"response.{self._kind(kind)}.delta", item_id=self.names[kind],
                                     output_index=index, content_index=0, delta=text, **own)
            if ended and not self.chat.answer.more:
                break
        for part in close():
            yield part
        for call in answer.calls:
            index += 1
            item = self.call(call)
            place = {"item_id": item["id"], "output_index": index}
            yield self.event("response.output_item.added", output_index=index,
                             item=item | {"arguments": "", "status": "in_progress"})
            yield self.event("response.function_call_arguments.delta", **place, delta=item["arguments"])
            yield self.event("response.function_call_arguments.done", **place, name=item["name"],
                             arguments=item["arguments"])
            yield self.event("response.output_item.done", output_index=index, item=item)
        body = self.end()
        yield self.event(f"response.{body['status']}", response=body)

    @staticmethod
    def _kind(kind: str) -> str:
        return "reasoning_text" if kind == "reasoning" else "output_text"
