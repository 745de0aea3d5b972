"""Tools in text (ReAct): their definitions go into a question, calls are found in the reply as it streams.

A model that was never trained on OpenAI's `tools` can use them as Qwen v1 did: the newest question lists them and asks
for steps of Thought, Action, Action Input; the program adds an Observation, and the same answer goes on with the next
Thought, up to a Final Answer. A step in an assistant's turn:

    Thought: I have to look this up.
    Action: get_weather
    Action Input: {"city": "北京"}
    Observation: 12 degrees

Source: ReAct (Yao et al. 2022, https://arxiv.org/abs/2210.03629); Qwen v1's openai_api.py for the words.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

STOP = ["\nObservation:", "\nObservation："]  # the model would go on and invent the result
NO_THOUGHT = "Thought: I need a tool."  # before a call that came without words
LAST_THOUGHT = "Thought: I now know the final answer.\nFinal Answer:"

# ---------------------------------------------------------------- messages to text


def check_tools(
    tools: Sequence[dict] | None, tool_choice: str | dict | None = "auto", legacy: bool = False
) -> list[str]:
    """The names of the tools that may be called: all, the one that tool_choice forces, or none.

    legacy: tools and tool_choice are what OpenAI once called functions and function_call.
    Raises: ValueError that begins with the field.
    """
    names = [function["name"] for function in _functions(tools, legacy)]
    field = "function_call" if legacy else "tool_choice"
    if tool_choice in (None, "auto"):
        return names
    if tool_choice == "none":
        return []
    if tool_choice == "required" and not legacy:
        if not names:
            raise ValueError(f"{field}: 'required' needs at least one tool in tools")
        return names
    name = tool_choice
    if isinstance(name, dict) and not legacy:
        name = name["function"] if name.get("type") == "function" and "function" in name else None
    name = name.get("name") if isinstance(name, dict) else None
    if not isinstance(name, str):
        form = "{'name': ..}" if legacy else "'required' or {'type': 'function', 'function': {'name': ..}}"
        raise ValueError(f"{field}: it must be 'none', 'auto', {form}")
    if name not in names:
        raise ValueError(f"{field}: there is no function {name!r}; there are {', '.join(names) or 'none'}")
    return [name]


def _functions(tools: Sequence[dict] | None, legacy: bool) -> list[dict]:
    if not isinstance(tools, (list, tuple, type(None))):
        raise ValueError(f"{'functions' if legacy else 'tools'}: it must be a list")
    functions: list[dict] = []
    for i, tool in enumerate(tools or ()):
        if not legacy and (not isinstance(tool, dict) or tool.get("type") != "function"):
            raise ValueError(f"tools[{i}].type: it must be 'function', the only kind of tool there is here")
        field, function = (f"functions[{i}]", tool) if legacy else (f"tools[{i}].function", tool.get("function"))
        if not isinstance(function, dict):
            raise ValueError(f"{field}: it must be an object with a name")
        name = function.get("name")
        if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
            raise ValueError(f"{field}.name: it must be 1 to 64 of the characters a-z, A-Z, 0-9, _ and -")
        if any(name == other["name"] for other in functions):
            raise ValueError(f"{field}.name: {name!r} is there twice; give every function its own name")
        for key, kind in (("description", str), ("parameters", dict)):
            if not isinstance(function.get(key), (kind, type(None))):
                raise ValueError(f"{field}.{key}: it must be {'a string' if kind is str else 'an object'}")
        functions.append(function)
    return functions


def flatten(
    messages: Sequence[dict],
    tools: Sequence[dict] | None = None,
    tool_choice: str | dict | None = "auto",
    legacy: bool = False,
) -> list[dict]:
    """OpenAI's messages as the tokenizer takes them (system, user, assistant, user, ...), tools and calls as text.

    - System and developer messages are joined and put first, neighbours of one role are joined, by a newline.
    - The tools stand before the last question.
    - Calls and their results become steps within one assistant turn.
    - If the last message is an assistant's, the model is to continue it: after results (with no tools to call, only
      the final answer is left to write), when tool_choice forces a call, or because the client put it there.
    - An answer with no question before it (a greeting) gets an empty one.

    messages: content is a string, or None beside tool_calls or function_call. legacy: as in check_tools.
    Raises: ValueError that begins with the field.
    """
    names = check_tools(tools, tool_choice, legacy)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("messages: it must be a list of at least one message")
    system: list[str] = []
    turns: list[dict] = []
    in_steps = False  # the last turn holds steps without a final answer

    def add(role: str, text: str) -> None:
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + text
        else:
            turns.append({"role": role, "content": text})

    i = 0
    while i < len(messages):
        message, field = messages[i], f"messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{field}: it must be an object with role and content")
        i += 1
        role, calls = message.get("role"), []
        if role in ("tool", "function"):
            name = "tool_calls" if role == "tool" else "function_call"
            raise ValueError(f"{field}.role: a {role} message must follow an assistant message with {name}")
        if role not in ("system", "developer", "user", "assistant"):
            raise ValueError(f"{field}.role: it must be system, developer, user, assistant, tool or function")
        if role == "assistant":
            calls = _calls(message, field)
        content = _content(message, field, may_lack=bool(calls))
        if role in ("system", "developer"):
            system.append(content)
        elif role == "user":
            in_steps = False
            add("user", content)
        elif calls:
            in_steps = True
            results, i = _results(messages, i, calls, field)
            text = f"Thought: {content}" if content else NO_THOUGHT
            for call, result in zip(calls, results, strict=True):
                text += f"\nAction: {call.name}\nAction Input: {call.arguments}\nObservation: {result}"
            add("assistant", text)
        else:
            add("assistant", f"{LAST_THOUGHT} {content}" if in_steps else content)
            in_steps = False

    if not turns or turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "content": ""})
    if names:
        question = [turn for turn in turns if turn["role"] == "user"][-1]
        allowed = [function for function in _functions(tools, legacy) if function["name"] in names]
        question["content"] = _tool_text(allowed) + question["content"]
    if forced_starts(names, tool_choice):
        chosen = "" if tool_choice == "required" else f" {names[0]}\nAction Input:"
        add("assistant", f"{NO_THOUGHT}\nAction:{chosen}")
    elif in_steps:
        add("assistant", "Thought:" if names else LAST_THOUGHT)
    return [{"role": "system", "content": "\n".join(system)}, *turns] if system else turns


class _Call(NamedTuple):
    id: str | None  # None: the old function_call, which has none
    name: str
    arguments: str


def _calls(message: dict, field: str) -> list[_Call]:
    """What an assistant message calls."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"{field}.tool_calls: it must be a list")
    found = []
    for k, call in enumerate(calls):
        where = f"{field}.tool_calls[{k}]"
        if not isinstance(call, dict) or not isinstance(call.get("id"), str):
            raise ValueError(f"{where}.id: it must be a string")
        if any(call["id"] == other.id for other in found):
            raise ValueError(f"{where}.id: {call['id']!r} is there twice")
        found.append(_call(call.get("function"), call["id"], f"{where}.function"))
    if message.get("function_call") is not None:
        if found:
            raise ValueError(f"{field}.function_call: a message has either tool_calls or function_call")
        found.append(_call(message["function_call"], None, f"{field}.function_call"))
    return found


def _call(function: object, id: str | None, field: str) -> _Call:
    if not isinstance(function, dict):
        raise ValueError(f"{field}: it must be an object with name and arguments")
    for key in ("name", "arguments"):
        if not isinstance(function.get(key), str):
            raise ValueError(f"{field}.{key}: it must be a string")
    return _Call(id, function["name"], function["arguments"])


def _content(message: dict, field: str, may_lack: bool = False) -> str:
    content = message.get("content")
    if content is None and may_lack:
        return ""
    if not isinstance(content, str):
        raise ValueError(f"{field}.content: it must be a string")
    return content


def _results(messages: Sequence[dict], i: int, calls: list[_Call], field: str) -> tuple[list[str], int]:
    """The results of the calls, in their order, in the messages from i on; the index of the message after them."""
    results: dict[str | None, str] = {}
    while i < len(messages) and isinstance(messages[i], dict) and messages[i].get("role") in ("tool", "function"):
        message, where = messages[i], f"messages[{i}]"
        is_tool = message["role"] == "tool"
        id = message.get("tool_call_id") if is_tool else None
        if is_tool and (not isinstance(id, str) or id in results or id not in [call.id for call in calls]):
            raise ValueError(f"{where}.tool_call_id: {id!r} is no call of {field} that waits for its result")
        if not is_tool and (calls[0].id is not None or results or message.get("name") != calls[0].name):
            raise ValueError(f"{where}.name: {message.get('name')!r} is no function_call that waits for its result")
        results[id] = _content(message, where)
        i += 1
    for call in calls:
        if call.id not in results:
            key = "function_call" if call.id is None else "tool_calls"
            raise ValueError(f"{field}.{key}: the call of {call.name} has no result; add its message right after it")
    return [results[call.id] for call in calls], i


def _tool_text(functions: Sequence[dict]) -> str:
    """What stands before the question. Short: it has to leave room in a context of 512 tokens."""
    lines = ["You can use these tools:"]
    for function in functions:
        about = f"{function['name']}: {(function.get('description') or '').strip()}"
        parameters = _short(function.get("parameters") or {})
        lines.append(f"{about} Parameters: {json.dumps(parameters, ensure_ascii=False, separators=(',', ':'))}")
    names = ", ".join(function["name"] for function in functions)
    lines += [
        "Format:",
        "Thought: what to do",
        f"Action: one of [{names}]",
        "Action Input: a JSON object",
        "Observation: the result",
        "(again, as often as needed)",
        f"{LAST_THOUGHT} the answer",
        "",
        "Question: ",
    ]
    return "\n".join(lines)


def _short(schema: object) -> object:
    """A JSON schema without what tells the model nothing: titles, $schema, that what has properties is an object."""
    if isinstance(schema, list):
        return [_short(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    idle = ("title", "$schema", "additionalProperties")
    short = {key: _short(value) for key, value in schema.items() if key not in idle}
    if isinstance(schema.get("properties"), dict):  # here the keys are the parameters' names
        short.pop("type", None)
        short["properties"] = {key: _short(value) for key, value in schema["properties"].items()}
    return short


def open_reply(messages: Sequence[dict]) -> str:
    """The assistant's text that the model is to continue, of messages from `flatten`; "" if it begins a new one."""
    return messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""


def forced_starts(names: Sequence[str], tool_choice: str | dict | None) -> list[str]:
    """What may come before the arguments of a call that tool_choice forces, for JsonConstraint; [] if it forces none.

    names: from check_tools.
    """
    if tool_choice == "required":
        return [f" {name}\nAction Input:" for name in names]
    return [""] if isinstance(tool_choice, dict) else []


# ---------------------------------------------------------------- a reply to calls


class Content(NamedTuple):
    text: str


class CallStart(NamedTuple):
    index: int  # 0, 1, ... in the reply
    id: str
    name: str


class CallArguments(NamedTuple):
    index: int
    text: str  # a JSON object as the model wrote it


Event = Content | CallStart | CallArguments


def new_call_id() -> str:
    """call_ and 24 random letters and digits."""
    return "call_" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(24))


COLON = "[:：]"
THOUGHT = re.compile(rf"\s*Thought{COLON}")
ACTION = re.compile(rf"\s*Action{COLON}")
ANSWER = re.compile(rf"\s*Final Answer{COLON}\s*(?=\S)")
EMPTY_ANSWER = re.compile(rf"Final Answer{COLON}\s*")
OBSERVATION = re.compile(rf"\s*Observation{COLON}")
AFTER_THOUGHT = re.compile(rf"\n[ \t]*(?:Action{COLON}|(?P<answer>Final Answer{COLON}\s*(?=\S)))")
ACTION_LINE = re.compile(rf"\n[ \t]*Action{COLON}")
ANY_LINE = re.compile(rf"\n[ \t]*(?:Thought|Action|Action Input|Observation|Final Answer){COLON}")
INPUT = re.compile(rf"\s*Action Input{COLON}\s*(?P<fence>```\w*\s*)?(?=\{{)")
PART_OF_INPUT = re.compile(rf"\s*(?:Action Input{COLON}\s*(?:`{{0,2}}|```\w*\s*))?")


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Numbers are not converted: only the form matters, and Python refuses those of 4301 digits.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_not_json)


def assemble(events: Iterable[Event]) -> tuple[str, list[dict]]:
    """The content of a whole reply, and its calls in OpenAI's form."""
    content, calls = "", []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallStart):
            calls.append({"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}})
        else:
            calls[event.index]["function"]["arguments"] += event.text
    return content, calls


class ToolParser:
    """Finds calls in a reply as it streams; what it gives out does not depend on how the text was cut.

    - A plain answer passes through; only what may become a marker at the beginning of a line is held back.
    - A reply that begins with `Thought:` is held back until a call or the final answer: the thought before a call is
      content (flatten makes it a thought again), the one before a final answer is dropped.
    - A call comes in one piece, when its JSON object is complete and valid. A name that is none of `names`, input
      that is no JSON object, a final answer that never comes: all that is plain text, given out unchanged.
    - What follows `Observation:` after a call, a result made up by the model, is dropped.

    Args:
        names: from check_tools.
        prefix: from open_reply: the beginning of the reply, which the model did not write and is not given out.
        parallel: False: one call at most; what follows it is dropped.
        new_id: makes the calls' ids.
    """

    def __init__(
        self,
        names: Sequence[str],
        prefix: str = "",
        *,
        parallel: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.names, self.parallel, self.new_id = names, parallel, new_id
        start = prefix.rfind("\nThought:") + 1
        if not prefix[start:].startswith("Thought:"):
            start = prefix.rfind("\n") + 1
        self.text = prefix[start:]  # not decided yet
        self.silent = len(self.text)  # so many characters of its beginning are the prefix's
        self.read = self._start  # one step of reading; returns True if it got on
        self.events: list[Event] = []
        self.calls = 0
        self.fenced = False  # ``` was opened before the last call's arguments
        self.said = False  # there was content
        self.gap = False  # and since then a call

    def feed(self, text: str) -> list[Event]:
        """What the next piece of the reply makes certain."""
        self.text += text
        return self._run(is_last=False)

    def finish(self) -> list[Event]:
        """The rest; to call after the last piece."""
        return self._run(is_last=True)

    def _run(self, is_last: bool) -> list[Event]:
        while self.text and self.read(is_last):
            pass
        events, self.events = self.events, []
        return events

    def _take(self, end: int, say: bool) -> None:
        """Removes text[:end], and gives it out as content if `say`."""
        if say:
            self._say(self.text[self.silent : end])
        self.text, self.silent = self.text[end:], max(0, self.silent - end)

    def _say(self, text: str) -> None:
        if text:
            self.events.append(Content("\n" + text if self.gap else text))
            self.said, self.gap = True, False

    def _start(self, is_last: bool) -> bool:
        """At the beginning of the reply, and after a call, where whitespace says nothing."""
        if self.calls:
            self._take(len(self.text) - len(self.text.lstrip()), say=False)
        if self.calls and OBSERVATION.match(self.text):
            self.read = self._nothing
        elif answer := ANSWER.match(self.text):
            self._take(answer.end(), say=False)
            self.read = self._plain
        elif THOUGHT.match(self.text) or ACTION.match(self.text):
            self.read = self._step
        else:
            begun = self.text.lstrip()
            words = ["Thought", "Action", "Final Answer"] + ["Observation"] * bool(self.calls) + ["```"] * self.fenced
            undecided = any(word.startswith(begun) for word in words) or EMPTY_ANSWER.fullmatch(begun)
            if self.fenced and begun.startswith("```"):
                self._take(self.text.index("```") + 3, say=False)
                self.fenced = False
            elif undecided and not is_last:
                return False
            else:
                self.read = self._plain
        return True

    def _plain(self, is_last: bool) -> bool:
        """In content, where only a call may follow."""
        if action := ACTION_LINE.search(self.text):
            self._take(action.start(), say=True)
            self.read = self._step
            return True
        newline = self.text.rfind("\n")
        is_open = not is_last and newline >= 0 and "Action".startswith(self.text[newline + 1 :].lstrip(" \t"))
        self._take(newline if is_open else len(self.text), say=True)
        return False

    def _step(self, is_last: bool) -> bool:
        """The text begins with Thought: or Action:; decides once it is a call, a final answer or neither."""
        text = self.text
        if thought := THOUGHT.match(text):
            action = AFTER_THOUGHT.search(text, thought.end())
            if action and action["answer"]:
                self._take(action.end(), say=False)
                self.read = self._plain
                return True
        else:
            action = ACTION.match(text)
        line_end = text.find("\n", action.end()) if action else -1
        if line_end < 0:
            return self._undecided(is_last)
        name = text[action.end() : line_end].strip(" \t\r`\"'[]")
        if name not in self.names:
            return self._malformed(line_end)
        begin = INPUT.match(text, line_end)
        if not begin:
            rest = text[line_end:]
            is_open = PART_OF_INPUT.fullmatch(rest) or "Action Input".startswith(rest.lstrip())
            return self._undecided(is_last) if is_open else self._malformed(line_end)
        try:
            _, end = _DECODER.raw_decode(text, begin.end())
        except (ValueError, RecursionError):
            marker = ANY_LINE.search(text, begin.end())
            return self._malformed(marker.start()) if marker else self._undecided(is_last)

        if thought:
            self._say(text[max(thought.end(), self.silent) : action.start()].strip())
        self.events += [
            CallStart(self.calls, self.new_id(), name),
            CallArguments(self.calls, text[begin.end() : end]),
        ]
        self._take(end, say=False)
        self.calls += 1
        self.gap = self.said
        self.fenced = bool(begin["fence"])
        self.read = self._start if self.parallel else self._nothing
        return True

    def _undecided(self, is_last: bool) -> bool:
        return self._malformed(len(self.text)) if is_last else False

    def _malformed(self, end: int) -> bool:
        self._take(end, say=True)
        self.read = self._plain
        return True

    def _nothing(self, is_last: bool) -> bool:
        """After the end: all is dropped."""
        self._take(len(self.text), say=False)
        return False
