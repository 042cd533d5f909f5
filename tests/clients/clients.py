"""OpenAI's Python client and what is built on it, against a running `strand serve`.

    python clients.py http://127.0.0.1:8000 KEY

Each case is written as a user of that library would write it; nothing is patched. One line a
case; the exit status is 1 if any failed. The server must be started with that key.
"""

import json
import sys
import time
import traceback
import urllib.request
from typing import Literal

import instructor
import litellm
import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

ADDRESS, KEY = sys.argv[1:]
BASE = ADDRESS + "/v1"
litellm.suppress_debug_info = True
client = OpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=60)
MODEL = client.models.list().data[0].id
QUESTION = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Say something about the harbour."},
]
CASES = []


def case(check):
    CASES.append(check)
    return check


def chat(**fields):
    fields = {"max_tokens": 24, "temperature": 0, "messages": QUESTION} | fields
    return client.chat.completions.create(model=MODEL, **fields)


def get(path, body=None):
    """What has no place in the client: a route of our own."""
    request = urllib.request.Request(ADDRESS + path, headers={"Authorization": f"Bearer {KEY}"})
    if body is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def refused(kind, ask):
    """The error of this class that asking ends in."""
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"it should be a {kind.__name__}")


# --- openai: chat -------------------------------------------------------------------------------


@case
def a_chat_is_answered():
    answer = chat()
    choice, usage = answer.choices[0], answer.usage
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-"), answer
    assert choice.message.role == "assistant" and choice.message.content, choice
    assert choice.finish_reason in ("stop", "length"), choice
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert usage.completion_tokens <= 24 and usage.prompt_tokens_details.cached_tokens >= 0, usage


@case
def a_streamed_chat_is_the_same_text():
    whole = chat()
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1, "one id a stream"
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content, text
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason], reasons
    last = chunks[-1]
    assert not last.choices and last.usage.completion_tokens == whole.usage.completion_tokens, last


@case
def the_helper_for_streams_gathers_the_same():
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, max_tokens=24, temperature=0
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == chat().choices[0].message.content


@case
def several_choices_are_numbered():
    answer = chat(n=4, temperature=1.5, seed=1)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2, 3]
    indices = {c.choices[0].index for c in chat(n=3, stream=True) if c.choices}
    assert indices == {0, 1, 2}, indices


@case
def a_stop_text_ends_the_answer_and_is_not_in_it():
    text = chat().choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for stops in (stop, [stop, "never said"]):
        choice = chat(stop=stops).choices[0]
        assert choice.message.content == text[: text.index(stop)], choice
        assert choice.finish_reason == "stop", choice


@case
def a_seed_decides_the_draws_of_every_choice():
    def draw(seed):
        fields = {"prompt": "The", "max_tokens": 16, "temperature": 1.5, "n": 3}
        choices = client.completions.create(model=MODEL, seed=seed, **fields).choices
        return [choice.text for choice in sorted(choices, key=lambda choice: choice.index)]

    first, again, other = draw(7), draw(7), draw(8)
    assert first == again != other and len(set(first)) == 3, (first, other)


@case
def logprobs_name_every_token():
    choice = chat(logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
    tokens = choice.logprobs.content
    # special tokens have no bytes
    text = b"".join(bytes(token.bytes or []) for token in tokens).decode()
    assert text.startswith(choice.message.content), (text, choice.message.content)
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3, token
        assert token.top_logprobs[0].logprob >= token.logprob - 1e-6, "greedy takes the likeliest"


@case
def content_may_come_in_parts_and_system_text_from_a_developer():
    parts = [{"type": "text", "text": "Say something about the harbour."}]
    answer = chat(messages=[QUESTION[0], {"role": "user", "content": parts}])
    assert answer.choices[0].message.content == chat().choices[0].message.content
    assert chat(messages=[{"role": "developer", "content": "Be brief."}, QUESTION[1]]).choices


# --- openai: completions ------------------------------------------------------------------------


@case
def a_completion_takes_text_lists_and_ids():
    ask = lambda prompt: client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=6, temperature=0
    )
    one = ask("The harbour").choices[0].text
    ids = json.loads(get("/tokenize", {"model": MODEL, "prompt": "The harbour"}))["tokens"]
    assert ask(ids).choices[0].text == one
    assert [choice.text for choice in ask(["The harbour", ids]).choices] == [one, one]
    streamed = client.completions.create(
        model=MODEL, prompt="The harbour", max_tokens=6, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == one


@case
def an_echo_with_logprobs_scores_the_prompt():
    answer = client.completions.create(
        model=MODEL, prompt="The harbour gate is green.", max_tokens=0, echo=True, logprobs=1
    )
    scores = answer.choices[0].logprobs
    assert answer.choices[0].text == "The harbour gate is green.", answer
    assert scores.token_logprobs[0] is None and all(p <= 0 for p in scores.token_logprobs[1:])
    assert len(scores.tokens) == len(scores.text_offset) == len(scores.token_logprobs)


# --- openai: answers of a shape, and tools ------------------------------------------------------


class Gate(BaseModel):
    """A gate of the harbour."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green", "blue"]
    number: int = Field(ge=0, le=99)
    open: bool


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Lund", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def is_weather(call):
    asked = json.loads(call.function.arguments)
    assert call.function.name == "weather" and call.type == "function" and call.id, call
    assert asked["town"] in ("Lund", "Oslo") and asked["days"] in (1, 2, 3), asked


@case
def a_schema_is_kept_to():
    schema = {"name": "gate", "strict": True, "schema": Gate.model_json_schema()}
    shape = {"type": "json_schema", "json_schema": schema}
    for fields in ({}, {"temperature": 1.5, "seed": 3}):
        Gate.model_validate_json(
            chat(response_format=shape, max_tokens=128, **fields).choices[0].message.content
        )


@case
def a_class_is_parsed_from_the_answer():
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Gate, max_tokens=128, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Gate), answer


@case
def a_named_tool_is_called():
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = chat(tools=[CLOCK, WEATHER], tool_choice=choice, max_tokens=128).choices[0]
    is_weather(answer.message.tool_calls[0])
    assert answer.finish_reason in ("tool_calls", "stop"), answer


@case
def a_required_tool_is_called_and_streamed():
    answer = chat(tools=[WEATHER], tool_choice="required", max_tokens=128).choices[0]
    is_weather(answer.message.tool_calls[0])
    assert answer.finish_reason == "tool_calls", answer
    fields = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 128}
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=0, **fields
    ) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    is_weather(streamed.message.tool_calls[0])
    arguments = answer.message.tool_calls[0].function.arguments
    assert streamed.message.tool_calls[0].function.arguments == arguments, streamed


@case
def tools_may_be_offered_and_their_results_told():
    answer = chat(tools=[WEATHER], tool_choice="auto").choices[0]
    assert answer.message.content or answer.message.tool_calls, answer
    assert chat(tools=[WEATHER], tool_choice="none").choices[0].message.content
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"town": "Oslo", "days": 1}'}
    told = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert chat(messages=told, tools=[WEATHER]).choices[0].message


# --- openai: responses --------------------------------------------------------------------------


@case
def a_response_is_created_and_streamed():
    fields = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    fields |= {"instructions": "You are brief.", "input": "Say something about the harbour."}
    answer = client.responses.create(**fields)
    assert answer.status in ("completed", "incomplete") and answer.output_text, answer
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    text, kinds = "", []
    for event in client.responses.create(stream=True, **fields):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert kinds[0] == "response.created" and text == answer.output_text, (kinds, text)
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds


@case
def a_response_comes_over_a_socket():
    fields = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    fields |= {"input": "Say something about the harbour."}
    whole = client.responses.create(**fields).output_text
    with client.responses.connect() as connection:
        for _ in range(2):
            connection.response.create(**fields)
            text = ""
            for event in connection:
                text += event.delta if event.type == "response.output_text.delta" else ""
                if event.type in ("response.completed", "response.incomplete"):
                    break
            assert text == whole, text


@case
def a_response_keeps_to_a_schema():
    fields = {"model": MODEL, "input": "A gate?", "max_output_tokens": 128, "temperature": 0}
    answer = client.responses.parse(text_format=Gate, **fields)
    assert isinstance(answer.output_parsed, Gate), answer


# --- openai: the rest ---------------------------------------------------------------------------


@case
def text_is_embedded():
    ask = lambda text, **fields: client.embeddings.create(model=MODEL, input=text, **fields).data
    # the client asks for base64 by itself, and decodes it
    one = ask("The harbour")[0].embedding
    both = ask(["The gate", "The harbour"])
    assert [data.index for data in both] == [0, 1] and len(one) == len(both[0].embedding) > 0
    plain = ask("The harbour", encoding_format="float")[0].embedding
    for other in (both[1].embedding, plain):
        assert all(abs(a - b) < 1e-5 for a, b in zip(one, other)), "the same text, the same vector"


@case
def the_model_is_listed_and_found():
    assert client.models.retrieve(MODEL).id == MODEL


@case
def text_becomes_tokens_and_text_again():
    told = json.loads(get("/tokenize", {"model": MODEL, "prompt": "Grün ist die Tür."}))
    assert told["count"] == len(told["tokens"]) and told["max_model_len"] > 0, told
    text = json.loads(get("/detokenize", {"model": MODEL, "tokens": told["tokens"]}))["prompt"]
    assert text.endswith("Grün ist die Tür."), text
    assert json.loads(get("/tokenizer_info")), "it says something of the tokenizer"


# --- openai: errors and leaving -----------------------------------------------------------------


@case
def a_wrong_key_is_refused():
    other = OpenAI(base_url=BASE, api_key="wrong", max_retries=0)
    error = refused(openai.AuthenticationError, lambda: other.models.list())
    assert error.code == "invalid_api_key", error


@case
def an_unknown_model_is_not_found():
    ask = lambda: client.chat.completions.create(model="no-such", messages=QUESTION)
    error = refused(openai.NotFoundError, ask)
    assert error.code == "model_not_found" and "no-such" in error.message, error


@case
def what_is_too_long_says_how_long_it_may_be():
    long = [{"role": "user", "content": "harbour " * 20_000}]
    error = refused(openai.BadRequestError, lambda: chat(messages=long))
    assert error.code == "context_length_exceeded", error
    assert "maximum context length is" in error.message, error


@case
def a_wrong_value_names_its_field():
    for field, value in {"temperature": -0.1, "top_p": 2, "n": 0, "stop": [""]}.items():
        error = refused(openai.BadRequestError, lambda: chat(**{field: value}))
        assert error.param == field, (field, error.param, error.message)


@case
def who_leaves_a_stream_is_not_waited_for():
    for _ in range(4):
        stream = chat(stream=True, max_tokens=400, temperature=1.0, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    started = time.monotonic()
    chat(max_tokens=1)
    assert time.monotonic() - started < 10, "four answers of 400 tokens are not computed first"


# --- litellm, langchain, instructor -------------------------------------------------------------


def lite(**fields):
    fields = {"max_tokens": 24, "temperature": 0, "messages": QUESTION} | fields
    return litellm.completion(model=f"openai/{MODEL}", api_base=BASE, api_key=KEY, **fields)


@case
def litellm_chats_and_streams():
    text = lite().choices[0].message.content
    assert text == chat().choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in lite(stream=True))
    assert streamed == text


@case
def litellm_knows_a_context_that_is_too_long():
    long = [{"role": "user", "content": "harbour " * 20_000}]
    refused(litellm.ContextWindowExceededError, lambda: lite(messages=long))


def langchain(**fields):
    fields = {"max_tokens": 48, "temperature": 0} | fields
    return ChatOpenAI(model=MODEL, base_url=BASE, api_key=KEY, max_retries=0, **fields)


@case
def langchain_chats_streams_and_takes_batches():
    text = langchain().invoke("Say something.").content
    assert text and "".join(part.content for part in langchain().stream("Say something.")) == text
    batch = langchain().batch(["Say something.", "Say more."])
    assert batch[0].content == text and len(batch) == 2


@case
def langchain_makes_objects_binds_tools_and_embeds():
    gate = langchain(max_tokens=128).with_structured_output(Gate, method="json_schema")
    assert isinstance(gate.invoke("A gate?"), Gate)
    bound = langchain(max_tokens=128).bind_tools([WEATHER], tool_choice="weather")
    call = bound.invoke("The weather?").tool_calls[0]
    assert call["name"] == "weather" and call["args"]["town"] in ("Lund", "Oslo"), call
    embedder = OpenAIEmbeddings(
        model=MODEL, base_url=BASE, api_key=KEY, check_embedding_ctx_length=False
    )
    assert len(embedder.embed_documents(["one", "two"])) == 2


@case
def litellm_embeds():
    embedded = litellm.embedding(
        model=f"openai/{MODEL}", input=["The harbour"], api_base=BASE, api_key=KEY
    )
    assert len(embedded.data[0]["embedding"]) > 0


@case
def instructor_makes_objects_by_schema_and_by_tool():
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        made = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            response_model=Gate,
            max_tokens=128,
            temperature=0,
            max_retries=0,
        )
        assert isinstance(made, Gate), made


def main():
    failed = 0
    for check in CASES:
        started = time.monotonic()
        try:
            check()
            word = "ok    "
        except Exception:
            traceback.print_exc()
            word, failed = "FAILED", failed + 1
        name = check.__name__.replace("_", " ")
        print(f"{word} {name} ({time.monotonic() - started:.1f} s)", flush=True)
    print(f"{len(CASES) - failed} of {len(CASES)} passed, openai {openai.__version__}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
