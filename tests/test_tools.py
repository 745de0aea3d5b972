"""model/tools.py: messages with tools as text, and calls found in streamed replies however the text is cut."""

import json
import re
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.tokenizer import check_messages, load_tokenizer
from model.tools import (
    STOP,
    CallArguments,
    CallStart,
    Content,
    ToolParser,
    check_tools,
    flatten,
    forced_starts,
    new_call_id,
    open_reply,
)

WEATHER = {
    "name": "get_weather",
    "description": "Current weather",
    "parameters": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Weather",
        "type": "object",
        "properties": {"city": {"type": "string", "title": "City"}, "title": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TIME = {"name": "get_time"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]
NAMES = ["get_weather", "get_time"]
FORCED = {"type": "function", "function": {"name": "get_time"}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None, *calls: tuple[str, str, str]) -> dict:
    message = {"role": "assistant", "content": text}
    if calls:
        functions = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
        message["tool_calls"] = functions
    return message


def tool(id: str, text: str) -> dict:
    return {"role": "tool", "tool_call_id": id, "content": text}


ROUND = [user("天气？"), assistant(None, ("c1", "get_weather", '{"city": "北京"}')), tool("c1", "12 degrees")]


# ---------------------------------------------------------------- messages to text


def test_the_last_question_is_told_of_the_tools():
    messages = [user("hello"), assistant("hi"), user("天气？")]
    first, second, last = flatten(messages, TOOLS)
    assert (first, second) == (messages[0], messages[1])
    assert last["role"] == "user" and last["content"].endswith("\n\nQuestion: 天气？")
    lines = last["content"].splitlines()
    shown = '{"properties":{"city":{"type":"string"},"title":{"type":"string"}},"required":["city"]}'
    assert f"get_weather: Current weather Parameters: {shown}" in lines
    assert "Action: one of [get_weather, get_time]" in lines
    for marker in ("Thought: ", "Action Input: ", "Observation: ", "Final Answer: "):
        assert sum(line.startswith(marker) for line in lines) >= 1, marker
    assert messages[2] == user("天气？"), "the caller's messages stay"
    assert flatten(messages) == flatten(messages, TOOLS, "none") == flatten(messages, []) == messages


def test_the_tools_leave_room_in_a_context_of_512():
    tokenizer = load_tokenizer()
    plain, told = (len(tokenizer.encode_chat(flatten(ROUND[:1], tools))) for tools in (None, TOOLS[:1]))
    assert told - plain < 200


def test_roles_are_brought_into_the_tokenizers_order():
    messages = [
        {"role": "developer", "content": "d"},
        assistant("welcome"),
        {"role": "system", "content": "s"},
        user("a"),
        user("b"),
        assistant("c"),
        assistant("d"),
        user("e"),
    ]
    assert flatten(messages) == [
        {"role": "system", "content": "d\ns"},
        user(""),
        assistant("welcome"),
        user("a\nb"),
        assistant("c\nd"),
        user("e"),
    ]
    assert flatten([{"role": "system", "content": "s"}]) == [{"role": "system", "content": "s"}, user("")]


def test_calls_and_results_are_steps_of_one_turn():
    question, reply = flatten(ROUND, TOOLS)
    assert question["content"].endswith("Question: 天气？")
    assert reply["content"] == (
        "Thought: I need a tool.\n"
        'Action: get_weather\nAction Input: {"city": "北京"}\nObservation: 12 degrees\nThought:'
    )
    more = [
        *ROUND,
        assistant("And now the time.", ("c2", "get_time", "{}"), ("c3", "get_weather", '{"city": ""}')),
        tool("c3", "no city"),  # in another order
        tool("c2", "noon\nsharp"),
        assistant("12 degrees."),
        user("Thanks."),
    ]
    steps = reply["content"].removesuffix("\nThought:") + (
        "\nThought: And now the time.\nAction: get_time\nAction Input: {}\nObservation: noon\nsharp"
        '\nAction: get_weather\nAction Input: {"city": ""}\nObservation: no city'
    )
    answer = "\nThought: I now know the final answer.\nFinal Answer:"
    assert flatten(more) == [user("天气？"), assistant(f"{steps}{answer} 12 degrees."), user("Thanks.")]
    assert flatten(more[:-2], TOOLS)[-1]["content"] == f"{steps}\nThought:"
    assert flatten(more[:-2])[-1]["content"] == flatten(more[:-2], TOOLS, "none")[-1]["content"] == steps + answer
    assert flatten([*more[:-2], user("Well?")], TOOLS)[1]["content"] == steps
    for length in (1, 3, 6, 7, 8):
        check_messages(flatten(more[:length], TOOLS))


def test_the_old_functions():
    call = {"role": "assistant", "content": None, "function_call": {"name": "get_time", "arguments": "{}"}}
    messages = [user("Time?"), call, {"role": "function", "name": "get_time", "content": "noon"}]
    question, reply = flatten(messages, [WEATHER, TIME], "auto", legacy=True)
    assert "one of [get_weather, get_time]" in question["content"]
    assert reply["content"].endswith("\nAction: get_time\nAction Input: {}\nObservation: noon\nThought:")
    chosen = {"name": "get_time"}
    assert open_reply(flatten(messages[:1], [WEATHER, TIME], chosen, legacy=True)).endswith(
        "Action: get_time\nAction Input:"
    )


@pytest.mark.parametrize(
    "choice, names, ending, starts",
    [
        ("auto", NAMES, "", []),
        (None, NAMES, "", []),
        ("none", [], "", []),
        ("required", NAMES, "\nAction:", [" get_weather\nAction Input:", " get_time\nAction Input:"]),
        (FORCED, ["get_time"], "\nAction: get_time\nAction Input:", [""]),
    ],
)
def test_tool_choice(choice, names, ending, starts):
    assert check_tools(TOOLS, choice) == names
    assert forced_starts(names, choice) == starts
    fresh = flatten(ROUND[:1], TOOLS, choice)
    reply = open_reply(fresh)
    assert reply.endswith(ending) and bool(reply) == bool(ending)
    assert ("get_weather" in fresh[0]["content"]) == ("get_weather" in names), "only what may be called is told"
    later = open_reply(flatten(ROUND, TOOLS, choice))
    assert later.endswith(ending or ("\nThought:" if names else "\nFinal Answer:"))


@pytest.mark.parametrize(
    "message, rest",
    [
        ("messages: ", dict(messages=[])),
        ("messages[0]: ", dict(messages=["hi"])),
        ("messages[0].role: ", dict(messages=[{"role": "human", "content": "hi"}])),
        ("messages[0].role: ", dict(messages=[{"role": ["user"], "content": "hi"}])),
        ("messages[0].content: ", dict(messages=[user(None)])),
        ("messages[1].content: ", dict(messages=[user(""), assistant(None)])),
        ("messages[1].role: a tool message must follow", dict(messages=[user("a"), tool("c1", "x")])),
        ("messages[2].role: ", dict(messages=[user("a"), assistant("b"), tool("c1", "x")])),
        ("messages[2].tool_call_id: 'c2'", dict(messages=[*ROUND[:2], tool("c2", "x")])),
        ("messages[3].tool_call_id: 'c1'", dict(messages=[*ROUND, tool("c1", "x")])),
        ("messages[2].tool_call_id: None", dict(messages=[*ROUND[:2], {"role": "tool", "content": "x"}])),
        ("messages[2].name: ", dict(messages=[*ROUND[:2], {"role": "function", "name": "f", "content": "x"}])),
        ("messages[2].content: ", dict(messages=[*ROUND[:2], tool("c1", None)])),
        ("messages[1].tool_calls: the call of get_weather has no result", dict(messages=ROUND[:2])),
        ("messages[1].tool_calls: ", dict(messages=[*ROUND[:2], user("b")])),
        ("messages[0].tool_calls[1].id: 'c'", dict(messages=[assistant("", ("c", "f", "{}"), ("c", "f", "{}"))])),
        ("messages[0].tool_calls[0].id: ", dict(messages=[assistant("", (1, "f", "{}"))])),
        ("messages[0].tool_calls[0].function.arguments: ", dict(messages=[assistant("", ("c", "f", {}))])),
        ("messages[0].function_call: ", dict(messages=[assistant("") | {"function_call": "f"}])),
        ("messages[0].tool_calls: ", dict(messages=[assistant("") | {"tool_calls": "f"}])),
        ("tools: ", dict(tools="all")),
        ("tools[0].type: ", dict(tools=[WEATHER])),
        ("tools[1].function: ", dict(tools=[TOOLS[0], {"type": "function"}])),
        ("tools[0].function.name: ", dict(tools=[{"type": "function", "function": {"name": "a b"}}])),
        ("tools[0].function.name: ", dict(tools=[{"type": "function", "function": {"name": "a" * 65}}])),
        ("tools[0].function.name: ", dict(tools=[{"type": "function", "function": {"name": "a\n"}}])),
        ("tools[1].function.name: 'get_time' is there twice", dict(tools=TOOLS[1:] * 2)),
        ("tools[0].function.parameters: ", dict(tools=[{"type": "function", "function": TIME | {"parameters": 1}}])),
        ("tools[0].function.description: ", dict(tools=[{"type": "function", "function": TIME | {"description": 1}}])),
        ("functions[0].name: ", dict(tools=[{"name": ""}], legacy=True)),
        ("tool_choice: ", dict(tools=TOOLS, tool_choice="always")),
        ("tool_choice: ", dict(tools=TOOLS, tool_choice={"type": "function", "function": "get_time"})),
        ("tool_choice: ", dict(tools=TOOLS, tool_choice={"name": "get_time"})),
        ("tool_choice: there is no function 'x'", dict(tools=TOOLS, tool_choice=FORCED | {"function": {"name": "x"}})),
        ("tool_choice: ", dict(tool_choice="required")),
        ("function_call: ", dict(tools=[TIME], tool_choice="required", legacy=True)),
        ("function_call: ", dict(tools=[TIME], tool_choice={"name": "x"}, legacy=True)),
    ],
)
def test_errors_begin_with_the_field(message, rest):
    with pytest.raises(ValueError) as error:
        flatten(**({"messages": ROUND} | rest))
    assert str(error.value).startswith(message)
    assert re.match(r"[\w.\[\]]+: ", str(error.value)) and "\n" not in str(error.value)


# ---------------------------------------------------------------- a reply to calls


def parse(*pieces: str, names=NAMES, prefix: str = "", parallel: bool = True) -> list:
    """The events, with neighbouring contents joined."""
    ids = count()
    parser = ToolParser(names, prefix, parallel=parallel, new_id=lambda: f"id{next(ids)}")
    events = []
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        if isinstance(event, Content) and events and isinstance(events[-1], Content):
            event = Content(events.pop().text + event.text)
        events.append(event)
    return events


def call(name: str = "get_weather", arguments: str = '{"city": "北京"}', index: int = 0) -> list:
    return [CallStart(index, f"id{index}", name), CallArguments(index, arguments)]


GOOD = 'Action: get_weather\nAction Input: {"city": "北京"}'
TIMES = "Action: get_time\nAction Input: {}"
LONG = '{"n": ' + "1" * 5000 + "}"
SPREAD = '{\n  "a": "}",\n  "b": [{}]\n}'

PARSED = [
    # well-formed
    (GOOD, call()),
    (f"Thought: look it up\n{GOOD}", [Content("look it up"), *call()]),
    (f"Thought: one\ntwo\n\n{GOOD}\nObservation: 12", [Content("one\ntwo"), *call()]),
    (f"Thought:\n{GOOD}\n", call()),
    (f" \n{GOOD} \n\n", call()),
    (f"Let me see.\n{GOOD}", [Content("Let me see."), *call()]),
    (f"Action: get_time\nAction Input: {SPREAD}\nObservation:", call("get_time", SPREAD)),
    ("Action:get_time\n\n  Action Input:\n{}", call("get_time", "{}")),
    ("Action: `get_time` \r\nAction Input: {}", call("get_time", "{}")),
    ("Thought：想\nAction：get_time\nAction Input：{}\nObservation：x", [Content("想"), *call("get_time", "{}")]),
    (f"{GOOD}\nObservation: 12\nThought: done\nFinal Answer: 12\n{TIMES}", call()),
    (f"{GOOD} That is all.", [*call(), Content("That is all.")]),
    # a code block around the arguments
    ("Action: get_time\nAction Input: ```json\n{}\n```\nObservation: x", call("get_time", "{}")),
    ("Action: get_time\nAction Input:\n```\n{}\n``` bye", [*call("get_time", "{}"), Content("bye")]),
    ("Action: get_time\nAction Input: ```{}``` ```", [*call("get_time", "{}"), Content("```")]),
    # two actions
    (f"{GOOD}\n{TIMES}", [*call(), *call("get_time", "{}", 1)]),
    (
        f"Thought: a\n{GOOD}\nThought: b\n{TIMES}\nThought: c\nFinal Answer: d",
        [Content("a"), *call(), Content("\nb"), *call("get_time", "{}", 1), Content("\nd")],
    ),
    (f"{GOOD}\nAction: nothing\nmore", [*call(), Content("Action: nothing\nmore")]),
    # final answers
    ("Thought: I know.\nFinal Answer: 12 degrees.\n\nWarm.", [Content("12 degrees.\n\nWarm.")]),
    ("Final Answer：\n 十二度 ", [Content("十二度 ")]),
    (f"Final Answer: 12.\n{TIMES}", [Content("12."), *call("get_time", "{}")]),
    # malformed, then well-formed
    (f"Action: get_time\nAction Input: none\n{GOOD}", [Content("Action: get_time\nAction Input: none"), *call()]),
    (f"Action: get_time\nAction Input: {{'a'}}\n{GOOD}", [Content("Action: get_time\nAction Input: {'a'}"), *call()]),
    (f"Action: fly\n{GOOD}", [Content("Action: fly"), *call()]),
    # a number that Python does not read
    (f"Action: get_time\nAction Input: {LONG}", call("get_time", LONG)),
    # nothing
    ("", []),
]

PLAIN = [
    "Hello.",
    " \n",
    "  Hello.\n\nAct",
    "Then came the Action: get_weather\n",
    f"As they say: {GOOD}",
    "Thoughtful words",
    "Thought: and no more",
    "Thought: a\nAction Input: {}",
    "Thought: a\nFinal Answer: ",
    "Final Answer:\n",
    "Action",
    "Action:",
    "Action: get_weather",
    "Action: get_weather\n",
    "Action: get_weather\nAction Inp",
    "Action: get_weather\nAction Input: ",
    "Action: get_weather\nAction Input:\nObservation: x\nThought: y\nFinal Answer: z",  # no input
    "Action: get_weather\nObservation: x",
    "Action: get_weather\nThe input is {}",
    "Action: get_weather Action Input: {}",
    'Action: get_weather\nAction Input: {"city": "北京"',
    "Action: get_weather\nAction Input: {'city': '北京'}\nObservation: 12\nThought: a",
    "Action: get_weather\nAction Input: {city: 1}",
    'Action: get_weather\nAction Input: {"a": NaN}',
    'Action: get_weather\nAction Input: {"a": "new\nline"}',
    'Action: get_weather\nAction Input: ["北京"]',
    'Action: get_weather\nAction Input: "北京"',
    "Action: get_weather\nAction Input: ```python\nx\n```",
    'Action: get_weather\nAction Input: {"a": ' + "[" * 100_000,
    "Action: Get_Weather\nAction Input: {}",
    "Action: get_weather, get_time\nAction Input: {}",
    "Thought: what?\nAction: fly\nAction Input: {}\nThought: I know.\nFinal Answer: 12",
    "Action: \nAction Input: {}",
    "Action：飞\n",
]


@pytest.mark.parametrize("text, events", [*PARSED, *((text, [Content(text)]) for text in PLAIN)])
def test_what_a_reply_is_taken_for(text, events):
    assert parse(text) == events
    for step in (1, 3) if len(text) < 1000 else ():
        assert parse(*(text[i : i + step] for i in range(0, len(text), step))) == events, step


WORDS = [*"Thought: |Action: |Action Input: |Observation: |Final Answer: |get_weather|get_time|{}|Thought：".split("|")]
WORDS += ["\n", "\n", " ", "```", "```json", '{"a": [1, {"b": "}\\n"}]}', '{"a":', "}", "Action", "好的。", "Hi"]
WORDS += [GOOD, TIMES, f"\n{GOOD}\n", "Thought: a\n", "\nFinal Answer: b"]
PREFIXES = ["", "Thought:", "I am", "Thought: a\nAction:", "a\nThought: b\nAction: get_time\nAction Input:"]


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), st.sampled_from(PREFIXES), st.data())
def test_cuts_do_not_matter(text, prefix, data):
    whole = parse(text, prefix=prefix)
    assert parse(*text, prefix=prefix) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(*pieces, prefix=prefix) == whole

    said = "".join(event.text for event in whole if isinstance(event, Content))
    calls = [event for event in whole if isinstance(event, CallStart)]
    assert [event.index for event in calls] == list(range(len(calls)))
    for start, arguments in zip(whole, whole[1:], strict=False):
        if isinstance(start, CallStart):
            assert start.name in NAMES and arguments.index == start.index
            assert isinstance(json.loads(arguments.text), dict) and arguments.text in prefix + text
    if not calls and "Final Answer" not in text:
        assert said == text, "nothing lost, nothing added"


@given(st.text())
@example("a\r\nb\x0bc\n Action")
def test_prose_passes_unchanged(text):
    assert parse(*text) == ([Content(text)] if text else [])


def test_a_plain_answer_is_held_back_as_little_as_can_be():
    parser = ToolParser(NAMES)
    assert parser.feed("T") == [] and parser.feed("he") == [Content("The")], "no marker begins so"
    assert parser.feed(" Action: a") == [Content(" Action: a")]
    assert parser.feed("\n Act") == [] and parser.feed("or") == [Content("\n Actor")]
    assert parser.feed("\nb\n") == [Content("\nb")]
    assert parser.finish() == [Content("\n")] and parser.finish() == []
    parser = ToolParser(NAMES)
    assert parser.feed("Thought: I know\nFinal Answer: tw") == [Content("tw")] and parser.feed("o") == [Content("o")]
    parser = ToolParser(NAMES)
    assert len(parser.feed(GOOD)) == 2, "a call comes as soon as its object is complete"


@pytest.mark.parametrize(
    "choice, messages, text, events",
    [
        ("required", ROUND[:1], ' get_weather\nAction Input: {"city": "北京"}', call()),
        ("required", ROUND[:1], " fly\nAction Input: {}", [Content(" fly\nAction Input: {}")]),
        (FORCED, ROUND[:1], ' {"a": 1}', call("get_time", '{"a": 1}')),
        (FORCED, ROUND[:1], " 1", [Content(" 1")]),
        (FORCED, ROUND, " {}\n", call("get_time", "{}")),
        ("auto", ROUND, " I now know.\nFinal Answer: 12", [Content("12")]),
        ("auto", ROUND, " 12 degrees it is.", [Content(" 12 degrees it is.")]),
        ("auto", ROUND, f" the time\n{TIMES}", [Content("the time"), *call("get_time", "{}")]),
        ("none", ROUND, " 12 degrees.", [Content("12 degrees.")]),
        ("none", ROUND, f" 12.\n{TIMES}", [Content(f"12.\n{TIMES}")]),
        ("auto", [user("x"), assistant("I")], f" see.\n{TIMES}", [Content(" see."), *call("get_time", "{}")]),
        ("auto", [user("x"), assistant("I\n")], TIMES, call("get_time", "{}")),
        ("auto", [user("x"), assistant("I do")], TIMES, [Content(TIMES)]),
    ],
)
def test_a_reply_that_was_begun(choice, messages, text, events):
    names = check_tools(TOOLS, choice)
    prefix = open_reply(flatten(messages, TOOLS, choice))
    assert parse(text, names=names, prefix=prefix) == parse(*text, names=names, prefix=prefix) == events


def test_one_call_at_most():
    for text in (f"Thought: a\n{GOOD}\n{TIMES}", f"Thought: a\n{GOOD} and more"):
        assert parse(text, parallel=False) == parse(*text, parallel=False) == [Content("a"), *call()]


def test_a_call_goes_there_and_back():
    """What the parser made of a reply, sent back as a client does, is the same text again."""
    reply = f"Thought: look it up\n{GOOD}"
    content, start, arguments = parse(reply)
    message = assistant(content.text, (start.id, start.name, arguments.text))
    sent_back = flatten([user("q"), message, tool(start.id, "12")], TOOLS)[-1]["content"]
    assert sent_back == f"{reply}{STOP[0]} 12\nThought:"


def test_call_ids():
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100 and all(re.fullmatch("call_[a-zA-Z0-9]{24}", id) for id in ids)
