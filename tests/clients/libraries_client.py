"""litellm, instructor and langchain-openai."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no look-up of prices

import instructor
import litellm
import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict

from tests.helpers.client_cases import HELLO, KEY, MODEL, URL, WEATHER, Cases

litellm.suppress_debug_info = True
lite, structured, chain = Cases("litellm"), Cases("instructor"), Cases("langchain-openai")


class City(StrEnum):
    paris = "Paris"
    oslo = "Oslo"


class Trip(BaseModel):
    """A journey."""

    model_config = ConfigDict(extra="forbid")  # else a random model adds keys until max_tokens
    city: City
    again: bool


def complete(**more: Any) -> Any:
    return litellm.completion(**({"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "messages": HELLO,
                                  "max_tokens": 8, "num_retries": 0} | more))


@lite("completion")
def _() -> None:
    assert complete(temperature=0, presence_penalty=0.1, user="u", seed=3).usage.completion_tokens > 0


@lite("stream")
def _() -> None:
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert litellm.stream_chunk_builder(chunks).choices[0].finish_reason in ("stop", "length")


@lite("tools, and the answer goes back")
def _() -> None:
    message = complete(tools=[WEATHER], tool_choice="required", max_tokens=1000).choices[0].message
    complete(tools=[WEATHER], messages=[*HELLO, message.model_dump(), {
        "role": "tool", "tool_call_id": message.tool_calls[0].id, "name": "weather", "content": "sunny"}])


@lite("a pydantic model as response_format")
def _() -> None:
    done = complete(response_format=Trip, max_tokens=1000, temperature=0)
    assert Trip.model_validate_json(done.choices[0].message.content)


@lite("text_completion, embedding")
def _() -> None:
    litellm.text_completion(model=f"text-completion-openai/{MODEL}", api_base=URL, api_key=KEY, prompt="fox",
                            max_tokens=4)
    assert litellm.embedding(model=f"openai/{MODEL}", api_base=URL, api_key=KEY, input=["fox"]).data


def create(mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)
    trip = client.chat.completions.create(model=MODEL, messages=HELLO, response_model=Trip, max_tokens=1000,
                                          temperature=0, max_retries=0)
    assert trip.city in City


@structured("tools")
def _() -> None:
    create(instructor.Mode.TOOLS)


@structured("JSON schema")
def _() -> None:
    create(instructor.Mode.JSON_SCHEMA)


@structured("parallel retries send messages back")
def _() -> None:
    client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=instructor.Mode.TOOLS)

    class Impossible(BaseModel):
        city: City

        @classmethod
        def model_validate_json(cls, *_: Any, **__: Any) -> Any:
            raise ValueError("never right")

    try:
        client.chat.completions.create(model=MODEL, messages=HELLO, response_model=Impossible, max_tokens=1000,
                                       temperature=0, max_retries=2)
    except openai.APIStatusError:
        raise
    except Exception as error:  # instructor's own, after its retries
        assert "BadRequest" not in str(error), error


@chain("invoke, stream, batch")
def _() -> None:
    llm = ChatOpenAI(model=MODEL, max_tokens=8, max_retries=0, temperature=0)
    assert llm.invoke("fox").content == "".join(str(c.content) for c in llm.stream("fox"))
    assert len(llm.batch(["one", "two"])) == 2


@chain("tools, and the answer goes back")
def _() -> None:
    llm = ChatOpenAI(model=MODEL, max_tokens=1000, max_retries=0).bind_tools([WEATHER], tool_choice="weather")
    message = llm.invoke("fox")
    ChatOpenAI(model=MODEL, max_tokens=8, max_retries=0).invoke([
        HumanMessage("fox"), message, ToolMessage("sunny", tool_call_id=message.tool_calls[0]["id"])])


@chain("with_structured_output")
def _() -> None:
    llm = ChatOpenAI(model=MODEL, max_tokens=1000, max_retries=0, temperature=0)
    assert llm.with_structured_output(Trip, method="json_schema").invoke("fox").city in City
    assert llm.with_structured_output(Trip, method="function_calling").invoke("fox").city in City


@chain("responses API")
def _() -> None:
    ChatOpenAI(model=MODEL, max_tokens=16, max_retries=0, use_responses_api=True).invoke("fox")


@chain("embeddings")
def _() -> None:
    assert len(OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False).embed_documents(["one", "two"])) == 2


if __name__ == "__main__":
    for cases in (lite, structured, chain):
        cases.run()
