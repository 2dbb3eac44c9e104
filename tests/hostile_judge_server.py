"""A judge's endpoint that answers with anything but what it was asked for: too much, too deep, cut, in the wrong types.

An item is known by "item N:" in its prompt. Its kind follows from the seed and N, and all calls for it are answered in
that kind. ``python tests/hostile_judge_server.py --seed 0`` prints its address and serves until its input closes.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from judge_server import JudgeServer


WORDS = {"analysis": "short", "feedback": "clear and short", "score": 2}
PAYLOAD = "PERFECT-REPLY"
MARKUP = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[good](javascript:alert(1))", "![x](http://a/x)",
    "` <b>bold</b> `", "``` ``` `", "a | b | c", "--- license: mit ---", "</code></pre><h1>x</h1>", "# heading",
    "good\x1b[2J\x1b]0;x\x07", "\u202egood", "<!-- x", "&lt;b&gt; &#60;", "$\\frac{1}{0}$", "{{ 7 * 7 }} {% raw %}",
    "## Training procedure", "http://127.0.0.1:9/ www.example.org", "* a\n* b", "\\` x \\`",
)  # fmt: skip


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": content}}], **more}


def verdict(**changes: Any) -> str:
    return json.dumps({**WORDS, **changes})


# ------------------------------------------------------------------------------------- kinds: (random) -> behaviour


def raw(body: bytes, status: int = 200, **headers: str) -> Callable[[Any], None]:
    """Answer with these bytes, whatever the headers say of them."""

    def send(handler: Any, begun: bool = False) -> None:
        if not begun:
            handler.send_response_only(status)
        for name, value in {"connection": "close", "content-length": str(len(body)), **headers}.items():
            if value:
                handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def endless(piece: bytes, **headers: str) -> Callable[[Any], None]:
    """Answer without end, or until the client goes."""

    def send(handler: Any) -> None:
        raw(b"", content_length="", **headers)(handler)
        while True:
            handler.wfile.write(piece)

    return send


def drip(handler: Any) -> None:
    raw(b"", content_length="1000")(handler)
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


@functools.cache
def bomb(encoding: str) -> Callable[[Any], None]:
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    return raw(pack(b'{"choices": "' + b"x" * 50_000_000), content_encoding=encoding)


def cookies(handler: Any) -> None:
    handler.send_response_only(200)
    for _ in range(15):
        handler.send_header("Set-Cookie", f"{random.random()}={'x' * 3000}; path=/")
    raw(GOOD)(handler, begun=True)


GOOD = json.dumps(chat(verdict())).encode()
SURROGATE = "good \ud83d"
KINDS: dict[str, Callable[[random.Random], Any]] = {
    "good": lambda r: chat(verdict(score=r.randrange(4))),
    "huge: a body without end": lambda r: r.choice(
        [
            endless(b"x" * 100_000),
            endless(b'{"a":' * 20_000),
            endless(b"1000\r\n" + b" " * 0x1000 + b"\r\n", transfer_encoding="chunked"),
        ]
    ),
    "huge: a body of 20 MB": lambda r: raw(json.dumps(chat("x" * 20_000_000)).encode()),
    "huge: a text beyond max_tokens": lambda r: chat(verdict(analysis="x" * r.choice([70_000, 80_000, 2_000_000]))),
    "huge: words without a space": lambda r: chat(verdict(feedback="x" * r.randint(500, 50_000))),
    "huge: a packed bomb": lambda r: bomb(r.choice(["gzip", "deflate"])),
    "huge: cookies": lambda r: cookies,
    "deep: the body": lambda r: raw(r.choice([b"[", b'{"a":']) * 200_000),
    "deep: the text": lambda r: chat(r.choice(["[", '{"a":', '{"score":[']) * r.choice([900, 5_000])),
    "deep: a value": lambda r: chat(f'{{"feedback": {"[" * 900}{"]" * 900}, "score": 1}}'),
    "deep: beside the text": lambda r: raw(GOOD[:-1] + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "cut: the body": lambda r: raw(GOOD[: r.randrange(len(GOOD))], content_length=str(len(GOOD))),
    "cut: the JSON": lambda r: raw(GOOD[: r.randrange(len(GOOD))]),
    "cut: a chunk": lambda r: raw(b"ff\r\n" + GOOD[:40], content_length="", transfer_encoding="chunked"),
    "cut: what is packed": lambda r: raw(gzip.compress(GOOD)[: -r.randint(1, 20)], content_encoding="gzip"),
    "NUL: in the words": lambda r: chat(verdict(**{r.choice(["feedback", "analysis"]): "go\0od"})),
    "NUL: in the body": lambda r: raw(GOOD.replace(b"short", b"sh\0rt")),
    "NUL: nothing else": lambda r: r.choice([raw(b"\0" * 1000), chat("\0" * 1000)]),
    "surrogates: in the words": lambda r: chat(verdict(**{r.choice(["feedback", "analysis"]): SURROGATE})),
    "surrogates: in the text": lambda r: chat(verdict().replace("short", SURROGATE)),
    "surrogates: in a key": lambda r: chat(verdict(**{SURROGATE: 1})),
    "surrogates: all of them": lambda r: chat("".join(map(chr, range(0xD800, 0xE000)))),
    "UTF-8: broken": lambda r: raw(GOOD.replace(b"short", bytes([r.randrange(0x80, 0x100)]) + b"hort", 1)),
    "UTF-8: another encoding": lambda r: raw(GOOD.decode().encode(r.choice(["utf-16", "utf-32"]))),
    "UTF-8: a codec that is none": lambda r: raw(
        GOOD, content_type=f"text/plain; charset={r.choice(['zlib_codec', 'idna', 'rot13', 'utf-16', 'punycode'])}"
    ),
    "types: of the body": lambda r: raw(
        r.choice([b"null", b"1", b"[]", b'""', b"{}", b"NaN", b"1e999", b"9" * 5000, b'{"choices": {"0": 1}}'])
    ),
    "types: of a choice": lambda r: {"choices": r.choice([None, [], [None], [[]], ["x"], [{"message": []}]])},
    "types: of the text": lambda r: chat(r.choice([None, 3, True, [], {}, [{"type": "text", "text": "x"}], {"a": []}])),
    "types: of a value": lambda r: chat(
        verdict(**{r.choice(["feedback", "score", "analysis"]): r.choice([None, True, 1.5, [], {}, "4", -1, 10**400])})
    ),
    "types: numbers": lambda r: chat(
        verdict(score="X").replace('"X"', r.choice(["1e999", "NaN", "-Infinity", "9" * 4000, "9" * 5000, "2.0", "03"]))
    ),
    "types: keys": lambda r: chat(r.choice(['{"score": 1, "score": 3, "feedback": "x"}', verdict(x=1), '{"x": 2}'])),
    "markup: in the words": lambda r: chat(verdict(feedback=r.choice(MARKUP))),
    "markup: in the reason": lambda r: chat(verdict(analysis=" ".join(MARKUP))),
    "markup: around the words": lambda r: chat(r.choice([f"<p>{verdict()}</p>", f"```\n{verdict()}\n```"])),
    "markup: blanks in a fence": lambda r: chat("```" + " " * 30_000 + "x"),
    "parroting: the question": lambda r: lambda question, judged: chat(question),
    "parroting: the reply": lambda r: lambda question, judged: chat(judged),
    "parroting: the form": lambda r: lambda question, judged: chat(question[question.rindex("{") :]),
    "breakout": lambda r: gullible,
    "HTTP: no HTTP": lambda r: r.choice([noise, raw(GOOD, status=r.choice([204, 205, 304, 999]))]),
    "HTTP: redirects": lambda r: raw(
        b"", status=r.choice([301, 302, 307, 308]),
        location=r.choice(["/v1/chat/completions", "http://127.0.0.1:99999/", "http://[", "ftp://x/", "javascript:1"]),
    ),
    "HTTP: packed unasked": lambda r: raw(*r.choice([(gzip.compress(GOOD),), (b"x" * 100,)]), content_encoding="gzip"),
    "HTTP: unknown packing": lambda r: raw(GOOD, content_encoding=r.choice(["br", "zstd", "gzip, gzip", "x"])),
    "HTTP: slow": lambda r: drip,
    "HTTP: refusals of pages": lambda r: raw(b"<html>" * 1_000_000, status=r.choice([500, 502, 503])),
}  # fmt: skip


def noise(handler: Any) -> None:
    handler.wfile.write(random.randbytes(300))


def gullible(question: str, judged: str) -> dict[str, Any]:
    """Give the best score where the payload stands outside of what the genuine markers enclose."""
    tag = re.search(r"<<<(-\w+)", question)[1]
    outside = re.sub(f"<<<{tag}.*?>>>{tag}", "", question, flags=re.DOTALL)
    escaped = PAYLOAD in outside
    return chat(verdict(feedback="escaped" if escaped else "stays inside", score=3 if escaped else 0))


def kind_of(seed: int, number: int) -> str:
    """The kinds take turns, in an order of the seed's."""
    kinds = random.Random(seed).sample(sorted(KINDS), len(KINDS))
    return kinds[number % len(kinds)]


class HostileServer(JudgeServer):
    """Answers each item in its kind."""

    def __init__(self, seed: int) -> None:
        super().__init__(answer=lambda text: "")
        self.seed, self.by_kind = seed, Counter()

    def behaviour_of(self, headers: dict[str, str], body: dict[str, Any]) -> tuple[str, Any]:
        question = body["messages"][0]["content"]
        number = int(re.search(r"item (\d+):", question)[1])
        kind = kind_of(self.seed, number)
        with self._lock:
            self.by_kind[kind] += 1
        behaviour = KINDS[kind](random.Random(f"{self.seed} {number} {kind}"))
        if kind == "breakout" or kind.startswith("parroting"):
            tag = re.search(r"<<<(-\w+)", question)[1]
            judged = re.findall(f"<<<{tag}.*?\n(.*?)\n>>>{tag}", question, flags=re.DOTALL)[-1]
            behaviour = behaviour(question, judged)
        return question, behaviour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    with HostileServer(parser.parse_args().seed) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:  # a line asks for the counts, the end of input stops
            print(json.dumps(server.by_kind), flush=True)


if __name__ == "__main__":
    main()
