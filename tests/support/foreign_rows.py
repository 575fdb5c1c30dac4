"""Generated conversations, and writers of foreign row formats that share no code with the reader.

A writer takes a canonical row and returns what the owner of a data set in that format would have.
Which features a conversation has is chosen by the caller, because no format holds all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

WORDS = [
    "grass", "green", "lamp", "hall", "rain", "Lima", "zwölf", "雨", "naïve", "🌧", "x=1", "a\\b",
    '"q"', "{k}", "<b>", "50%", "tab\there", "two\nlines", "shed", "rake", "3.5", "end.",
]  # fmt: skip


def text(rng: random.Random, most: int = 6) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def value(rng: random.Random, depth: int = 0) -> Any:
    kinds = ["text", "int", "float", "bool", *(["list", "object"] if depth < 2 else [])]
    match rng.choice(kinds):
        case "text":
            return text(rng, 2)
        case "int":
            return rng.randint(-5, 10**9)
        case "float":
            return rng.randint(0, 99) / 4
        case "bool":
            return rng.random() < 0.5
        case "list":
            return [value(rng, depth + 1) for _ in range(rng.randint(1, 3))]
        case _:
            return {f"k{i}": value(rng, depth + 1) for i in range(rng.randint(1, 3))}


def tool(rng: random.Random, name: str) -> Row:
    properties = {f"a{i}": {"type": "string", "description": text(rng, 2)} for i in range(2)}
    parameters = {"type": "object", "properties": properties, "required": ["a0"]}
    function = {"name": name, "description": text(rng, 4), "parameters": parameters}
    return {"type": "function", "function": function}


def conversation(
    rng: random.Random,
    *,
    rounds: int = 3,
    system: bool = True,
    calls: int = 0,
    ids: bool = False,
    reasoning: bool = False,
    said: bool = True,
    train: bool = False,
) -> Row:
    """A canonical row.

    Args:
        rng: the source of randomness.
        rounds: most user turns.
        system: whether it may have a system prompt.
        calls: most calls of one turn; 0: no tools.
        ids: whether calls have ids.
        reasoning: whether turns may have reasoning.
        said: whether a turn with calls may have text.
        train: whether turns may have a mark.
    """
    messages: list[Row] = []
    if system and rng.random() < 0.5:
        messages.append({"role": "system", "content": text(rng)})
    number = 0
    for _ in range(rng.randint(1, rounds)):
        messages.append({"role": "user", "content": text(rng)})
        while calls and rng.random() < 0.5:
            made = []
            for _ in range(rng.randint(1, calls)):
                function = {"name": f"f{rng.randint(0, 1)}", "arguments": {"a0": value(rng)}}
                made.append({"type": "function", "function": function})
                if ids:
                    made[-1]["id"] = f"call_{number}"
                    number += 1
            spoken = text(rng) if said and rng.random() < 0.5 else ""
            messages.append({"role": "assistant", "content": spoken, "tool_calls": made})
            for call in made:
                result = {"role": "tool", "content": text(rng)}
                if ids:
                    result["tool_call_id"] = call["id"]
                messages.append(result)
        messages.append({"role": "assistant", "content": text(rng)})
    for message in messages:
        if message["role"] == "assistant":
            if reasoning and rng.random() < 0.5:
                message["reasoning_content"] = text(rng)
            if train and rng.random() < 0.5:
                message["train"] = rng.random() < 0.5
    row: Row = {"messages": messages}
    if calls and rng.random() < 0.8:
        row["tools"] = [tool(rng, f"f{i}") for i in range(2)]
    return row


def pad(rng: random.Random, item: Row, *keys: str) -> Row:
    """The item with null and empty keys that clients and Arrow write."""
    empty: tuple[Any, ...] = (None, [], {}, "")
    return {**item, **{key: rng.choice(empty) for key in keys if key not in item}}


# Writers.


def openai(row: Row, rng: random.Random) -> Row:
    """The chat API's form: arguments as a string, weights, developer in place of system."""
    out = []
    for message in row["messages"]:
        one: Row = {"role": message["role"], "content": message["content"]}
        if one["role"] == "system":
            one["role"] = rng.choice(("system", "developer"))
        if "tool_calls" in message:
            one["content"] = message["content"] or None
            one["tool_calls"] = [
                {
                    "id": call["id"], "type": "function", "index": index,
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": json.dumps(call["function"]["arguments"]),
                    },
                }
                for index, call in enumerate(message["tool_calls"])
            ]  # fmt: skip
        if "train" in message:
            one["weight"] = int(message["train"])
        if "tool_call_id" in message:
            one["tool_call_id"] = message["tool_call_id"]
        if "reasoning_content" in message:
            one["reasoning_content"] = message["reasoning_content"]
        out.append(pad(rng, one, "refusal", "audio", "annotations", "function_call"))
    made: Row = {"messages": out, "parallel_tool_calls": True}
    if "tools" in row:
        made["tools"] = rng.choice((row["tools"], json.dumps(row["tools"])))
    if rng.random() < 0.3:
        made["messages"] = json.dumps(made["messages"])
    return pad(rng, made, "tools", "functions", "rejected")


def openai_functions(row: Row, rng: random.Random) -> Row:
    """The API before tools: ``functions``, ``function_call``, role ``function``."""
    out = []
    for message in row["messages"]:
        one: Row = {"role": message["role"], "content": message["content"]}
        if one["role"] == "tool":
            one["role"] = "function"
        if "tool_calls" in message:
            (call,) = message["tool_calls"]
            arguments = json.dumps(call["function"]["arguments"])
            one["function_call"] = {"name": call["function"]["name"], "arguments": arguments}
        out.append(one)
    made: Row = {"messages": out}
    if "tools" in row:
        made["functions"] = [one["function"] for one in row["tools"]]
    return made


def trl_pair(row: Row, rng: random.Random) -> Row:
    """Prompt and completion as lists; the completion is the last turn of the assistant."""
    prompt = [{k: v for k, v in m.items() if k != "train"} for m in row["messages"][:-1]]
    made: Row = {"prompt": prompt, "completion": [row["messages"][-1]]}
    if "tools" in row:
        made["tools"] = json.dumps(row["tools"])
    if "chat_template_kwargs" in row:
        made["chat_template_kwargs"] = row["chat_template_kwargs"]
    return pad(rng, made, "tools", "chat_template_kwargs")


def sharegpt(row: Row, rng: random.Random) -> Row:
    """``from`` and ``value``; every call and every result is an item."""
    user = rng.choice(("human", "user", "Human"))
    bot = rng.choice(("gpt", "assistant", "chatgpt", "model", "bard"))
    answer = rng.choice(("observation", "tool", "function_response", "tool_response"))
    items: list[Row] = []
    made: Row = {}
    for message in row["messages"]:
        said = message["content"]
        marked = {"weight": int(message["train"])} if "train" in message else {}
        if message["role"] == "system" and rng.random() < 0.5:
            made["system"] = said
        elif message["role"] == "system":
            items.append({"from": "system", "value": said})
        elif message["role"] == "user":
            items.append({"from": user, "value": said})
        elif message["role"] == "tool":
            items.append({"from": answer, "value": said})
        elif "tool_calls" in message:
            if said:
                items.append({"from": bot, "value": said, **marked})
            calls = [call["function"] for call in message["tool_calls"]]
            if len(calls) > 1 and rng.random() < 0.5:
                items.append({"from": "function_call", "value": json.dumps(calls), **marked})
            else:
                items += [
                    {"from": "function_call", "value": json.dumps(call), **marked} for call in calls
                ]
        else:
            items.append({"from": bot, "value": said, **marked})
    made[rng.choice(("conversations", "conversation"))] = items
    if "tools" in row:
        made["tools"] = json.dumps([one["function"] for one in row["tools"]])
    return pad(rng, made, "tools", "system")


def alpaca(row: Row, rng: random.Random) -> Row:
    """One pair of turns and the ones before it."""
    turns = list(row["messages"])
    made: Row = {}
    if turns[0]["role"] == "system":
        made["system"] = turns.pop(0)["content"]
    said = [turn["content"] for turn in turns]
    *pairs, (last, made["output"]) = list(zip(said[::2], said[1::2]))
    made["history"] = [list(pair) for pair in pairs]
    head, mark, tail = last.partition("\n")
    made["instruction"], made["input"] = (head, tail) if mark and head and tail else (last, "")
    return made


def ms_swift_pair(row: Row, rng: random.Random) -> Row:
    """A prompt and an answer under two of the names that ms-swift maps."""
    pair = alpaca(row, rng)
    last = row["messages"][-2]["content"]
    query = rng.choice(("query", "question", "problem", "prompt", "instruction"))
    response = rng.choice(("response", "answer", "target", "targets", "solution"))
    system = {rng.choice(("system", "system_prompt")): pair["system"]} if "system" in pair else {}
    history = pair["history"]
    return {
        query: last, response: pair["output"], **system,
        "history": json.dumps(history, ensure_ascii=False) if rng.random() < 0.3 else history,
    }  # fmt: skip


def ms_swift_messages(row: Row, rng: random.Random) -> Row:
    """Messages with the roles ``tool_call`` and ``tool_response`` and with ``loss``."""
    out: list[Row] = []
    for message in row["messages"]:
        marked = {}
        if "train" in message:
            marked = {"loss": rng.choice((message["train"], int(message["train"])))}
        if message["role"] == "tool":
            out.append({"role": "tool_response", "content": message["content"]})
            continue
        if message["content"] or "tool_calls" not in message:
            out.append({"role": message["role"], "content": message["content"], **marked})
        for call in message.get("tool_calls", ()):
            content: Any = call["function"]
            content = json.dumps(content) if rng.random() < 0.5 else content
            out.append({"role": "tool_call", "content": content, **marked})
    made: Row = {"messages": out}
    if "tools" in row:
        made["tools"] = [json.dumps(one) for one in row["tools"]]
    return pad(rng, made, "images", "videos", "audios", "objects")


def anthropic(row: Row, rng: random.Random) -> Row:
    """Content blocks: thinking, text, tool_use; results in a user turn."""
    made: Row = {}
    out: list[Row] = []
    cached = {"cache_control": {"type": "ephemeral"}}
    results: list[Row] = []
    for message in row["messages"]:
        said = message["content"]
        if message["role"] == "system":
            made["system"] = rng.choice((said, [{"type": "text", "text": said, **cached}]))
            continue
        if message["role"] == "tool":
            content: Any = rng.choice((said, [{"type": "text", "text": said}]))
            result = {"type": "tool_result", "tool_use_id": message["tool_call_id"]}
            results.append({**result, "content": content, "is_error": None})
            continue
        if results:
            out.append({"role": "user", "content": results})
            results = []
        if message["role"] == "user":
            blocks = [{"type": "text", "text": said, **cached}]
            out.append({"role": "user", "content": rng.choice((said, blocks))})
            continue
        blocks = []
        if "reasoning_content" in message:
            thought = message["reasoning_content"]
            blocks.append({"type": "thinking", "thinking": thought, "signature": "c2ln"})
        if said:
            blocks.append({"type": "text", "text": said})
        for call in message.get("tool_calls", ()):
            function = call["function"]
            block = {"type": "tool_use", "id": call["id"], "name": function["name"]}
            blocks.append({**block, "input": function["arguments"]})
        out.append({"role": "assistant", "content": blocks})
    made["messages"] = out
    if "tools" in row:
        made["tools"] = [
            {
                "name": one["function"]["name"], "description": one["function"]["description"],
                "input_schema": one["function"]["parameters"], **cached,
            }
            for one in row["tools"]
        ]  # fmt: skip
    return made


AXOLOTL = {
    "field_messages": "dialog",
    "field_tools": "functions_json",
    "field_thinking": "thoughts",
    "message_property_mappings": {"role": "speaker", "content": "utterance"},
    "message_field_training": "learn",
    "roles": {"assistant": ["doctor", "nurse"], "user": ["patient"], "system": "rules"},
}


def axolotl(row: Row, rng: random.Random) -> Row:
    """The rows of a data set with the mapping `AXOLOTL`."""
    names = {"user": "patient", "system": "rules", "tool": "tool"}
    out = []
    for message in row["messages"]:
        role = names.get(message["role"]) or rng.choice(("doctor", "nurse"))
        one: Row = {"speaker": role, "utterance": message["content"]}
        if "tool_calls" in message:
            one["tool_calls"] = message["tool_calls"]
        if "reasoning_content" in message:
            one["thoughts"] = message["reasoning_content"]
        if "train" in message:
            one["learn"] = message["train"]
        out.append(one)
    made: Row = {"dialog": rng.choice((out, json.dumps(out)))}
    if "tools" in row:
        made["functions_json"] = json.dumps(row["tools"])
    return made


FACTORY_SHAREGPT = {
    "file_name": "rows.json",
    "formatting": "sharegpt",
    "columns": {"messages": "turns", "tools": "apis", "system": "sys"},
    "tags": {
        "role_tag": "who", "content_tag": "what", "user_tag": "Q", "assistant_tag": "A",
        "observation_tag": "R", "function_tag": "F", "system_tag": "S",
    },
}  # fmt: skip
FACTORY_ALPACA = {
    "file_name": "rows.json",
    "columns": {"prompt": "ask", "query": "more", "response": "reply", "system": "sys",
                "history": "before"},
}  # fmt: skip


def factory_sharegpt(row: Row, rng: random.Random) -> Row:
    """The rows of a data set with the entry `FACTORY_SHAREGPT`."""
    items: list[Row] = []
    made: Row = {"unlisted": "left out"}
    for message in row["messages"]:
        if message["role"] == "system" and rng.random() < 0.5:
            made["sys"] = message["content"]
        elif "tool_calls" in message:
            calls = [call["function"] for call in message["tool_calls"]]
            held = json.dumps(calls[0] if len(calls) == 1 else calls)
            items.append({"who": "F", "what": held})
        else:
            tag = {"user": "Q", "assistant": "A", "tool": "R", "system": "S"}[message["role"]]
            items.append({"who": tag, "what": message["content"]})
    made["turns"] = items
    if "tools" in row:
        made["apis"] = json.dumps([one["function"] for one in row["tools"]])
    return made


def factory_alpaca(row: Row, rng: random.Random) -> Row:
    """The rows of a data set with the entry `FACTORY_ALPACA`."""
    pair = alpaca(row, rng)
    names = {"instruction": "ask", "input": "more", "output": "reply", "system": "sys",
             "history": "before"}  # fmt: skip
    return {names[key]: held for key, held in pair.items()}


Writer = Callable[[Row, random.Random], Row]
